"""Merged embeddings by hand: recorded decisions, written out as matrices, and the projectors of the bare models."""

import torch
import torch.nn.functional as F

from tests import tiny
from tests.invariants.language import bare, image_embeddings, mixing
from tests.tiny import FAMILIES, PATCHED


class Spy:
    """Records what a method answers while it is in place."""

    def __init__(self, monkeypatch, method, verb):
        self.calls = []
        original = getattr(method, verb)

        def noted(subject, keep):
            answer = original(subject, keep)
            self.calls.append((subject, answer))
            return answer

        monkeypatch.setattr(method, verb, noted, raising=False)


def merged_by_hand(name, sample, calls):
    """What stands at the kept places per image, from the recorded decisions alone: (kept, vectors)."""
    vectors = image_embeddings(name, sample)
    kept = [list(range(len(x))) for x in vectors]
    embeddings = list(vectors)
    for images, assignment in calls:
        parts = len(images._units) // len(images)
        for row in range(len(images)):
            together = list(dict.fromkeys(unit.image for unit in images._units[row * parts : (row + 1) * parts]))
            W = mixing(assignment, row, sum(len(embeddings[i]) for i in together))
            if assignment.before_projector:
                found = [projector_input(name, sample, i) for i in together]
                new = found[0][1](W @ torch.cat([x for x, _ in found]))
            else:
                new = W @ torch.cat([embeddings[i] for i in together])
            at, start = assignment.kept[row], 0
            for i in together:
                mine = (at >= start) & (at < start + len(embeddings[i]))
                vectors[i], kept[i] = new[mine], (at[mine] - start).tolist()
                start += len(embeddings[i])
    return kept, vectors


def watch(model, module, sample):
    """(input, output) of a module while a model encodes the images of a sample."""
    seen = []
    handle = module.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
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


@torch.no_grad()
def tower_by_hand(name, sample, calls):
    """The tower block by block: after the attention of each, the recorded step says how its tokens become fewer."""
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
    return kept, vectors


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
