"""The bare model at full length in which some rows of its prompts take no part in the attention of some layers."""

from __future__ import annotations

import torch

from tests.invariants.reference import FullLength, bare, close, longer, shared


class Among(FullLength):
    """Layers where rows of prompts that are not chosen see nothing and are not seen; all others see them.

    Args:
        prompts: (first, end) rows of each prompt of a conversation; what stands between them was generated.
        layers: where rows are chosen.
        discards: what was not chosen is gone for rows behind its prompt, too.
    """

    def __init__(self, name, batch, tokens, layers, discards=False, prompts=None):
        super().__init__(name, batch, tokens)
        self.at, self.discards, self.prompts = layers, discards, prompts or [(0, self.prompt)]

    def choose(self, pick):
        """{layer: (B, H, L) bool}, each choice made on the attention that the earlier ones have left.

        `pick(layer, rows, maps)` says for one sample which of the ascending `rows` (list of int) of a prompt take part
        in each head, as H sets of rows, from the attention `maps` (H, L, L) of the layer.
        """
        chosen = {}
        for layer in self.at:
            chosen[layer] = torch.ones(len(self.valid), self.heads, self.rows, dtype=torch.bool)
            for s, (first, end) in enumerate(self.prompts):
                maps = self.under(chosen, done={layer: s})[1][layer]
                for b in range(len(self.valid)):
                    rows = [r for r in range(first, end) if self.valid[b, r]]
                    for h, taken in enumerate(pick(layer, rows, maps[b])):
                        for r in rows:
                            chosen[layer][b, h, r] = r in taken
        return chosen

    def under(self, chosen, done=None):
        """Logits and attention when the rows `chosen` take part; of layers in `done` only the first prompts count."""
        masks, handles = [], []
        for i in range(self.layers):
            see = self.causal(i).expand(-1, self.heads, -1, -1).clone()
            takes = torch.ones(len(self.valid), self.heads, self.rows, dtype=torch.bool)
            for first, end in self.prompts[: (done or {}).get(i)] if i in chosen else ():
                part = torch.zeros(self.rows, dtype=torch.bool)
                part[first:end] = True
                out = part & ~chosen[i]  # (B, H, L)
                takes &= ~out
                hidden_from = part if not self.discards else torch.arange(self.rows) >= first
                see &= ~(out[:, :, None] & hidden_from[:, None])
            masks.append(see)
            if not takes.all():
                share = takes.transpose(1, 2)[..., None]  # (B, L, H, 1)
                cut = lambda _, args, share=share: ((args[0].unflatten(-1, (share.shape[2], -1)) * share).flatten(2),)
                handles.append(bare(self.name).get_decoder().layers[i].self_attn.o_proj.register_forward_pre_hook(cut))
        try:
            return self.run(masks)
        finally:
            for handle in handles:
                handle.remove()


def best(rows, score, count):
    """The `count` of `rows` with the highest score, ties going to the lower one."""
    return set(sorted(rows, key=lambda r: (-score[r], r))[:count])


def learn(name, batch, run):
    """A training step of the compressed model on what it has generated behind the prompt: it scores what it has said.

    Returns:
        the batch with its labels; gradients are in the model, which is in eval mode again.
    """
    model, n = shared(name), run.tokens.shape[1]
    whole = longer(name, batch, run.tokens)
    whole["labels"] = whole["input_ids"].clone()
    whole["labels"][:, :-n] = -100
    out = model.train()(**whole, use_cache=False)
    model.eval()
    close(out.logits[:, -n - 1 : -1], run.logits)
    out.loss.backward()
    return whole
