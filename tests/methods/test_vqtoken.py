"""VQToken: clusters that are there are found, frames count by what they hold, and the layer by hand."""

import pytest
import torch

from hf_compress.methods.vision.vqtoken import Codebook, VQToken
from tests.invariants.reference import fresh
from tests.methods.test_ppllava import shown
from tests.methods.test_vision_compressors import check_gradients, stir


def directions(order):
    """Tokens of five directions at right angles, of different lengths, in this order."""
    return torch.eye(8)[torch.tensor(order)] * torch.rand(len(order), 1).add(0.5)


def video(x, frames, module=None):
    return shown(x[None], torch.zeros(1, x.shape[1]), [(1, len(x) // frames)] * frames, module or Codebook(8, 6))


def test_card_means_are_those_of_well_separated_directions():
    order = [0, 1, 0, 2, 2, 1, 3, 0, 4, 4, 3, 1, 2, 0, 4]
    x = directions(order)
    tokens = video(x, 3)
    answer = VQToken().assign(tokens, 5)
    assert answer.groups[0].tolist() == order and answer.kept[0].tolist() == [0, 1, 3, 6, 8]
    out = VQToken().make(tokens, answer)[0]  # a new layer does nothing
    for k in range(5):
        torch.testing.assert_close(out[k], x[torch.tensor(order) == k].mean(0))


def test_card_frames_in_another_order_change_the_map_alone():
    """The same video twice: the same tokens; with frames exchanged the same means, and the map with its frames."""
    x = directions([0, 1, 0, 2, 2, 1, 3, 0, 4, 4, 3, 1])
    swapped = x.view(3, 4, 8)[[1, 0, 2]].flatten(0, 1)
    module, shares = Codebook(8, 6), []
    module.across.register_forward_hook(lambda _, given, out: shares.append(given[1]))
    one, other = video(x, 3, module), video(swapped, 3, module)
    answers = [VQToken().assign(tokens, 5) for tokens in (one, other, one)]
    outs = [VQToken().make(tokens, answer) for tokens, answer in zip((one, other, one), answers)]
    assert torch.equal(outs[0], outs[2]) and torch.equal(answers[0].groups, answers[2].groups)
    for mean in outs[0][0]:
        assert (outs[1][0] - mean).abs().amax(-1).min() < 1e-6
    exchanged = answers[1].groups[0].view(3, 4)[[1, 0, 2]].flatten()
    same = lambda groups: groups[:, None] == groups
    assert torch.equal(same(exchanged), same(answers[0].groups[0]))


def test_by_loop():
    """Two heads: the vector of a frame is the mean of the codes of its cells; then the layer, output by output."""
    module, index = stir(Codebook(128, 6)).double(), torch.tensor([[[0, 1, 1, 2], [2, 2, 0, 0], [3, 1, 2, 3]]])
    means = torch.randn(1, 4, 128).double()
    frames = torch.stack([sum(module.code[i] for i in row) / 4 for row in index[0].tolist()])

    def read(attention, x, y):
        query, source, out = attention.query(attention.norm(x)), attention.key_value(attention.norm(y)), []
        keys, values = source.chunk(2, -1)
        for i, q in enumerate(query):
            heads = []
            for part in (slice(0, 64), slice(64, 128)):
                share = torch.stack([(q[part] * k[part]).sum() / 8 for k in keys]).softmax(0)
                heads.append(sum(s * v[part] for s, v in zip(share, values)))
            out.append(x[i] + attention.out(torch.cat(heads)))
        return torch.stack(out)

    x = read(module.among, means[0], means[0])
    expected = module.mlp(read(module.across, x, frames))
    torch.testing.assert_close(module(means, index)[0], expected)


def test_gradients_reach_means_and_codes():
    index = torch.tensor([[[0, 1, 2], [2, 2, 0]], [[1, 1, 0], [0, 2, 1]]])

    class On(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = Codebook(8, 3)

        def forward(self, means):
            return self.module(means, index)

    check_gradients(On(), torch.randn(2, 3, 8))


def test_more_tokens_than_codes_are_refused():
    with pytest.raises(ValueError, match="codes=3 give at most 3 tokens, and 18 shall stay"):
        fresh("llava").compress("vqtoken", ratio=0.5, codes=3)


@pytest.mark.parametrize("knob", ["codes", "steps"])
def test_knobs(knob):
    with pytest.raises(ValueError, match=f"{knob}=0 must be"):
        fresh("llava").compress("vqtoken", ratio=0.5, **{knob: 0})
