"""Merged embeddings by hand: recorded decisions, written out as matrices, and the projectors of the bare models."""

import itertools

import torch
import torch.nn.functional as F

from tests import tiny
from tests.invariants.language import FullLength, bare, image_embeddings, mixing
from tests.tiny import FAMILIES, PATCHED


class Spy:
    """Records what a method answers while it is in place; the tokens that it was shown note what it `made` of them."""

    def __init__(self, monkeypatch, method, verb):
        self.calls = []
        original, make = getattr(method, verb), method.make

        def noted(subject, keep):
            answer = original(subject, keep)
            self.calls.append((subject, answer))
            return answer

        def filled(tokens, assignment):
            tokens.made = make(tokens, assignment)
            return tokens.made

        monkeypatch.setattr(method, verb, noted, raising=False)
        monkeypatch.setattr(method, "make", filled, raising=False)


def merged_by_hand(name, sample, calls):
    """Kept tokens per image, and what stands there, from the recorded decisions alone."""
    vectors = image_embeddings(name, sample)
    kept = [list(range(len(x))) for x in vectors]
    embeddings, told = list(vectors), Told(name, sample)
    for images, assignment in calls:
        parts = len(images._units) // len(images)
        for row in range(len(images)):
            together = list(dict.fromkeys(unit.image for unit in images._units[row * parts : (row + 1) * parts]))
            W = mixing(assignment, row, sum(len(embeddings[i]) for i in together))
            if (made := getattr(images, "made", None)) is not None:
                made, extra = made if isinstance(made, tuple) else (made, None)
                new = made[row]
                if extra is not None:
                    told.add(together, extra[row])
            elif assignment.before_projector:
                found = [projector_input(name, sample, i) for i in together]
                new = found[0][1](W @ torch.cat([x for x, _ in found]))
            else:
                new = W @ torch.cat([embeddings[i] for i in together])
            at, start = assignment.kept[row], 0
            for i in together:
                mine = (at >= start) & (at < start + len(embeddings[i]))
                vectors[i], kept[i] = new[mine], (at[mine] - start).tolist()
                start += len(embeddings[i])
    return kept, dict(vectors=vectors, more=told.mean)


class Told:
    """What is added to the text of a sample: the mean of what the images in front of each word tell it."""

    def __init__(self, name, sample):
        self.full = FullLength(name, sample, sample["input_ids"][:, :1])
        self.sum, self.count = None, torch.zeros(self.full.rows)

    def add(self, images, vectors):
        rows = self.full.images(0)
        last = max(row for i in images for row in rows[i])
        behind = [row for row in range(last + 1, self.full.rows) if not any(row in mine for mine in rows)]
        self.sum = torch.zeros(self.full.rows, vectors.shape[-1]) if self.sum is None else self.sum
        self.sum[behind] += vectors[len(vectors) - len(behind) :]
        self.count[behind] += 1

    @property
    def mean(self):
        return None if self.sum is None else self.sum / self.count.clamp(min=1)[:, None]


def watch(model, module, sample):
    """(input, output) of a module while a model encodes the images of a sample."""
    seen = []
    read = lambda _, args, kwargs, out: seen.append((args[0] if args else next(iter(kwargs.values())), out))
    handle = module.register_forward_hook(read, with_kwargs=True)
    try:
        model.base_model.get_image_features(**tiny.encoder_inputs(sample), return_dict=True)
    finally:
        handle.remove()
    return seen[0]


@torch.no_grad()
def projector_input(name, sample, image):
    """(N, Dv) what the projector of the bare model reads for one image in reading order, and the projector."""
    model = bare(name)
    base = model.base_model
    if name in PATCHED:
        merger = base.visual.merger
        x, out = watch(model, merger, sample)
        place = {tuple(row): i for i, row in enumerate(out.tolist())}  # Qwen2.5 works in window order
        order = [place[tuple(row)] for row in image_embeddings(name, sample)[image].tolist()]
        return x.reshape(len(out), -1)[order], lambda y: merger(y.reshape(-1, x.shape[-1]))
    if name == "gemma4":  # squares of patches averaged, placed by the tower; the projector reads all images in one row
        x, _ = watch(model, base.embed_vision, sample)
        sizes = [len(mine) for mine in image_embeddings(name, sample)]
        return x.split(sizes)[image], base.embed_vision
    if name in FAMILIES["lfm2"]:  # squares of patches of the tower, each projected as an image of its own
        out = base.get_image_features(**tiny.encoder_inputs(sample), return_dict=True).last_hidden_state[image]
        h, w = sample["spatial_shapes"][image].tolist()
        squares = torch.arange(h * w).view(h, w).unfold(0, 2, 2).unfold(1, 2, 2).reshape(-1, 4)
        return out[squares].flatten(1), lambda y: base.multi_modal_projector(y.view(len(y), 2, 2, -1)).flatten(0, 2)
    if name in FAMILIES["idefics3"]:  # the projector shuffles, then multiplies
        x, _ = watch(model, base.connector.modality_projection, sample)
        return x[image], base.connector.modality_projection
    projector = base.vision_projection if name == "lighton_ocr" else base.multi_modal_projector
    if name == "gemma3":  # the projector averages patches, then normalises and multiplies
        x, _ = watch(model, projector.mm_soft_emb_norm, sample)
        return x[image], lambda y: projector.mm_soft_emb_norm(y) @ projector.mm_input_projection_weight
    x, _ = watch(model, projector, sample)
    if name in FAMILIES["cohere"]:  # the projector shuffles, a square of patches being one token
        x = projector.pixel_shuffle(x).flatten(1, 2)[image]
        whole = torch.arange(4)[None, :, None].float()
        order = projector.pixel_shuffle(whole).flatten().long().argsort()  # and the square that is shuffled to itself
        return x, lambda y: projector(y.unflatten(1, (4, -1))[:, order]).flatten(0, 2)
    if name in FAMILIES["pixtral"]:  # images of any size in one row, squares of patches joined by the projector
        side, sizes = tiny.PATCH, sample["image_sizes"].tolist()
        (h, w), start = sizes[image], sum(a * b for a, b in sizes[:image]) // side**2
        at = torch.arange(h * w // side**2).view(h // side, w // side) + start
        squares = at.unfold(0, 2, 2).unfold(1, 2, 2).reshape(-1, 4)
        square = (2 * side, 2 * side)
        return x[squares].flatten(1), lambda y: projector(y.reshape(-1, x.shape[-1]), [square] * len(y))
    return x[image], lambda y: projector(y[None])[0]


def tower_by_hand(name, sample, calls):
    """The tower block by block: after the attention of each, the recorded step says how its tokens become fewer."""
    return (packed_by_hand if name in PATCHED else side_by_side)(name, sample, calls)


@torch.no_grad()
def side_by_side(name, sample, calls):
    """Kept tokens and their vectors, per image."""
    model, steps = bare(name).model, [answer for _, answer in calls]
    tower, pixels = model.vision_tower, sample["pixel_values"]
    if cls := int(name != "paligemma"):  # CLIP: features of the last but one block, without [CLS]
        before, blocks, after = tower.pre_layrnorm, tower.encoder.layers[:-1], torch.nn.Identity()
    else:  # SigLIP
        before, blocks, after = torch.nn.Identity(), tower.encoder.layers, tower.post_layernorm
    count, x = len(pixels), before(tower.embeddings(pixels))
    assert len(steps) == len(blocks)
    whole = torch.eye(x.shape[1]).expand(count, -1, -1)
    for block, step in zip(blocks, steps):
        a, y = block.self_attn, block.layer_norm1(x)
        q, k, v = (proj(y).unflatten(-1, (a.num_heads, -1)).transpose(1, 2) for proj in (a.q_proj, a.k_proj, a.v_proj))
        size = (whole > 0).sum(-1)
        weights = (q @ k.mT * a.head_dim**-0.5 + size.log()[:, None, None]).softmax(-1)
        x = x + a.out_proj((weights @ v).transpose(1, 2).flatten(2))
        if step is not None:
            W = torch.stack([mixing(step, i, x.shape[1]) for i in range(count)])
            x, whole = W @ x, W @ whole
        x = x + block.mlp(block.layer_norm2(x))
    kept, vectors = [], []
    for i in range(count):
        first = [int(row.nonzero()[0]) for row in whole[i]]  # a merged token stands where its first member stood
        order = sorted(range(cls, len(first)), key=first.__getitem__)
        kept.append([first[j] - cls for j in order])
        vectors.append(model.multi_modal_projector(after(x)[i, order][None])[0])
    return kept, dict(vectors=vectors)


@torch.no_grad()
def packed_by_hand(name, sample, calls):
    """The same where images of any size stand in one row, four patches are a token and blocks may see windows only."""
    model, seen = bare(name), []
    tower, note = model.base_model.visual, lambda _, args, kwargs: seen.append((args[0], kwargs))
    watching = [block.register_forward_pre_hook(note, with_kwargs=True) for block in tower.blocks]
    _, out = watch(model, tower.merger, sample)
    for handle in watching:
        handle.remove()
    place = {tuple(row): i for i, row in enumerate(out.tolist())}  # of every token in the tower
    x, source = seen[0][0], list(range(len(seen[0][0])))
    whole, later, deep = torch.eye(len(x) // 4), getattr(tower, "deepstack_visual_indexes", []), []
    starts = [0, *sample["image_grid_thw"].prod(-1).cumsum(0).tolist()]
    for number, (block, (_, kwargs)) in enumerate(zip(tower.blocks, seen)):
        size = (whole > 0).sum(-1).repeat_interleave(4)
        x = x + block.attn.proj(attention_by_hand(block.attn, block.norm1(x), source, size, kwargs))
        full = range(len(tower.blocks)) if calls[0][0].steps == len(tower.blocks) else tower.fullatt_block_indexes
        matrices = {}
        for view, answer in calls:
            if answer is not None and full[view.index] == number:
                tokens = view.hidden.shape[1]
                for row, crop in enumerate(view._crops):
                    W, order = mixing(answer, row, tokens), answer.kept[row].argsort()
                    matrices[crop] = W[order], answer.kept[row][order]
        parts, stay, at = [], [], 0
        for crop, (start, stop) in enumerate(itertools.pairwise(starts)):
            n = sum(start <= i < stop for i in source) // 4
            W, kept = matrices.get(crop, (torch.eye(n), torch.arange(n)))
            parts.append(W)
            stay += [source[4 * (at + k) + p] for k in kept.tolist() for p in range(4)]
            at += n
        M, source = torch.block_diag(*parts), stay
        x, whole = (M @ x.view(len(M[0]), -1)).view(-1, x.shape[-1]), M @ whole
        x = x + block.mlp(block.norm2(x))
        if number in later:
            deep.append((whole, tower.deepstack_merger_list[later.index(number)](x)))
    kept, vectors, merged, slots = [], [], tower.merger(x), []
    for embeddings in image_embeddings(name, sample):
        tokens = [place[tuple(row)] for row in embeddings.tolist()]
        first = {}  # group: its first token in reading order
        for token, unit in enumerate(tokens):
            for group in whole[:, unit].nonzero()[:, 0].tolist():
                first.setdefault(group, token)
        kept.append(sorted(first.values()))
        vectors.append(merged[sorted(first, key=first.__getitem__)])
        slots += [tokens[token] for token in kept[-1]]
    deep = [features[[int(then[:, slot].argmax()) for slot in slots]] for then, features in deep]
    return kept, dict(vectors=vectors, deep=deep)


@torch.no_grad()
def entered_by_hand(name, sample, kept):
    """What stands at the `kept` tokens of each image if only their patches enter the first block of the tower."""
    model = bare(name)
    if name in PATCHED:
        tower, seen = model.base_model.visual, []
        note = lambda _, args, kwargs: seen.append((args[0], kwargs))
        watching = [block.register_forward_pre_hook(note, with_kwargs=True) for block in tower.blocks]
        _, out = watch(model, tower.merger, sample)
        for handle in watching:
            handle.remove()
        place = {tuple(row): i for i, row in enumerate(out.tolist())}
        images = [[place[tuple(row)] for row in x.tolist()] for x in image_embeddings(name, sample)]
        chosen = [[tokens[k] for k in mine] for tokens, mine in zip(images, kept, strict=True)]
        units = sorted(unit for mine in chosen for unit in mine)
        source = [4 * unit + p for unit in units for p in range(4)]
        x, later, deep = seen[0][0][source], getattr(tower, "deepstack_visual_indexes", []), []
        order = [[units.index(unit) for unit in mine] for mine in chosen]
        for number, (block, (_, kwargs)) in enumerate(zip(tower.blocks, seen)):
            one = torch.ones(len(x))
            x = x + block.attn.proj(attention_by_hand(block.attn, block.norm1(x), source, one, kwargs))
            x = x + block.mlp(block.norm2(x))
            if number in later:
                deep.append(tower.deepstack_merger_list[later.index(number)](x)[list(itertools.chain(*order))])
        return dict(vectors=[tower.merger(x)[mine] for mine in order], deep=deep)
    tower, cls, vectors = model.model.vision_tower, int(name != "paligemma"), []
    for pixels, mine in zip(sample["pixel_values"], kept, strict=True):
        x = tower.embeddings(pixels[None])[:, [*range(cls), *(k + cls for k in mine)]]
        x = tower.pre_layrnorm(x) if cls else x
        for block in tower.encoder.layers[: -1 if cls else None]:
            x = block(x, None)
        x = x if cls else tower.post_layernorm(x)
        vectors.append(model.model.multi_modal_projector(x[:, cls:])[0])
    return dict(vectors=vectors)


def attention_by_hand(attn, y, source, size, kwargs):
    """(R, D): rows of equal images (or windows) see each other, by whole maps with ln(size) on the keys."""
    qkv = (
        attn.qkv(y).unflatten(1, (3, attn.num_heads, -1)).unbind(1)
        if hasattr(attn, "qkv")
        else [proj(y).unflatten(1, (attn.num_heads, -1)) for proj in (attn.q, attn.k, attn.v)]
    )
    cos, sin = (t[source][:, None] for t in kwargs["position_embeddings"])
    q, k = (t * cos + torch.cat([-t.chunk(2, -1)[1], t.chunk(2, -1)[0]], -1) * sin for t in qkv[:2])
    part = torch.bucketize(torch.tensor(source), kwargs["cu_seqlens"].long(), right=True)
    see = torch.zeros(len(part), len(part)).masked_fill(part[:, None] != part, -torch.inf) + size.log()
    logits = torch.einsum("ihd,jhd->hij", q, k) * attn.scaling + see
    return torch.einsum("hij,jhd->ihd", logits.softmax(-1), qkv[2]).flatten(1)


@torch.no_grad()
def resized_by_hand(name, sample, method, keep):
    """Embeddings and DeepStack features of every image of a Qwen sample after its pixels were resized by patches."""
    m, p, vectors, deep = tiny.QWEN_MERGE, tiny.PATCH, [], []
    patches = sample["pixel_values"].split(sample["image_grid_thw"].prod(-1).tolist())
    for rows, (_, h, w) in zip(patches, sample["image_grid_thw"].tolist()):
        new = method.resize((h // m, w // m), keep(h * w // m**2))
        image = torch.zeros(2, 3, h * p, w * p)
        for row, (y, x) in zip(rows, patch_corners(h, w)):
            image[:, :, y : y + p, x : x + p] = row.view(3, 2, p, p).transpose(0, 1)
        size = (new[0] * m * p, new[1] * m * p)
        small = F.interpolate(image, size, mode="bicubic", antialias=True)
        flat = [
            small[:, :, y : y + p, x : x + p].transpose(0, 1).flatten()
            for y, x in patch_corners(new[0] * m, new[1] * m)
        ]
        grid = torch.tensor([[1, new[0] * m, new[1] * m]])
        encode = bare(name).base_model.get_image_features
        out = encode(pixel_values=torch.stack(flat), image_grid_thw=grid, return_dict=True)
        vectors.append(out.pooler_output[0])
        deep.append([torch.cat(list(x)) for x in getattr(out, "deepstack_features", None) or []])
    return dict(vectors=vectors, deep=[torch.cat(images) for images in zip(*deep)])


def patch_corners(h, w):
    """Pixel corners of the patches of an image in the order of the processor: 2 x 2 groups, row by row."""
    m, p = tiny.QWEN_MERGE, tiny.PATCH
    return [
        ((gy * m + y) * p, (gx * m + x) * p)
        for gy in range(h // m)
        for gx in range(w // m)
        for y in range(m)
        for x in range(m)
    ]
