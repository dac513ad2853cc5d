"""What methods see before the language model: visual tokens, text, and blocks of a vision tower."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn


class Tokens(Protocol):
    """n sequences of N visual tokens that the language model would read, each ONE unit of decision.

    What that is says `VisionMethod.scope`: a crop, or all crops of an image, frames of a video, images of a sample,
    part behind part.
    """

    @property
    def grids(self) -> list[tuple[int, int]]:
        """(h, w) of every part of a sequence, row-major, the same for all n; together they have N cells."""

    @property
    def grid(self) -> tuple[int, int]:
        """That of the only part: h * w == N."""

    @property
    def place(self) -> Tensor:
        """(n, N, 3) int64: of every token the number of its part, its row, its column.

        Parts are numbered as they stand in the prompt, frames in the order of time; of a crop alone it is the number in
        its image.
        """

    @property
    def boxes(self) -> list[tuple[float, float, float, float]]:
        """Where every part lies in its image: (top, left, bottom, right) as fractions of its sides.

        The image in small, where crops come with one, lies over all of it.

        Raises:
            ValueError: that is not known; a method whose `needs` name "places" is never asked then.
        """

    @property
    def image(self) -> Tensor:
        """(n, N) int64: the ordinal of the image (or video) of every token in its sample."""

    @property
    def content(self) -> Tensor:
        """(n,) int64, for methods that draw: a number for the pixels of each sequence and its place in the sample.

        The place is the ordinal of the image and of the crop in it, of all that a sequence holds. Neither the rest of
        the batch, nor padding, nor the device changes it. Features that were passed ready-made are told apart by a few
        coarse signs, which the rounding of another batch all but never turns.
        """

    @property
    def device(self) -> torch.device:
        """Where its tensors are."""

    def __len__(self) -> int: ...

    @property
    def module(self) -> nn.Module | None:
        """What the method trains (`Method.module`), as it is now: looked up at every call, never to be held."""

    @property
    def losses(self) -> list[Tensor]:
        """Scalars appended here, by `make`, are added to the loss of this forward where labels are given."""

    @property
    def count(self) -> int:
        """N."""

    @property
    def embeddings(self) -> Tensor:
        """(n, N, D) visual tokens as the language model reads them (projector output)."""

    @property
    def features(self) -> Tensor:
        """(n, N, Dv) what the projector reads; where it joins patches into one token, their concatenation."""

    @property
    def pixels(self) -> Tensor:
        """(n, N, C) the pixels of the patches that make each token, normalised as the tower is given them.

        Of adapters that give "pixels"; a method that reads them names it among its `needs`.
        """

    def attention(
        self,
        back: int = 0,
        *,
        rows: str = "cls",
        surrogate: str | None = None,
        logits: bool = False,
        heads: str = "each",
    ) -> Tensor:
        """(n, H, N) fp32: attention on every token in one block of the tower, mean over the patches of a token.

        Softmax runs over all keys, the column of [CLS] is dropped behind it. Never an N x N map: "all" is streamed.

        Args:
            back: blocks before the one whose features the projector reads, over blocks that see the whole image.
            rows: the softmax row of "cls", of the "mean" query of the patches, or what "all" rows give on average.
            surrogate: which of the other two is meant on a tower without [CLS].
            logits: what the softmax is taken of; of "all", which is none, the logarithm.
            heads: "each" by itself, or "all" as one (H = 1): queries and keys of all heads side by side.

        Raises:
            ValueError: the tower has no [CLS] and there is no `surrogate`, or `reads` has not declared the attention.
        """

    def states(self, what: str, back: int = 0, *, heads: str = "mean") -> Tensor:
        """(n, N, d): states of the tokens in one block of the tower, mean over the patches of a token.

        Args:
            what: "key" or "value", or "hidden" (what the block gives).
            back: as of `attention`.
            heads: of keys and values the "mean" over the heads, or "all" of them side by side.

        Raises:
            ValueError: `reads` has not declared it.
        """

    def looked_at(self, layer: int, rows: str = "last") -> Tensor:
        """(n, H, N) fp32: what rows of the prompt attend to in a layer of the language model, mean over these rows.

        The prompt is that of this forward with everything in it, without answers to train on and without gradient; the
        softmax runs over all that a row sees. Rows of earlier turns are not seen again. 0 where there are no such rows.
        Cost: one further forward over the prompt, up to the deepest layer that `reads` names (2 of 32 layers are a
        sixteenth of the prefill), and O(R * S) per head for R rows, streamed.

        Args:
            rows: "last" (of the prompt), "text" (behind the last token of the sequence), or all that come "later" (also
                those of other images).

        Raises:
            ValueError: `reads` has not declared it: `Read("layer", layer, "attention")`.
        """

    @property
    def depth(self) -> int:
        """Blocks of the tower that see the whole image, up to the one whose features the projector reads."""

    def whole(self, what: str, back: int = 0) -> Tensor:
        """(n, P, d) fp32: what each of the P parts says of itself as a whole: the state of its [CLS].

        On a tower without [CLS]: the mean of its tokens, weighted by the attention that they receive in this block, as
        a row that looked at them would gather it.

        Args:
            what, back: as of `states`; there the attention of the block is to be declared too.
        """

    @property
    def question(self) -> tuple[Tensor, Tensor]:
        """(n, T, D) embedded text of the sample behind each image, padded, and (n, T) bool, which of it is real.

        Rows with labels are no question. T can be 0.

        Raises:
            ValueError: `reads` has not declared it.
        """


class Text(Protocol):
    """The N tokens of one sample's prompt that may go, in their order; nothing generated, no answers to train on."""

    ids: Tensor  # (1, N) int64
    embeddings: Tensor  # (1, N, D)
    at: Tensor  # (1, N) int64, the rows at which they stand in the forward, padding counted
    length: int  # rows of the prompt, those that always stay included, padding not

    @property
    def module(self) -> nn.Module:
        """The module that the method trains, as it is now; see `Method.module`."""

    @property
    def layers(self) -> int:
        """How many layers the language model has; for methods that read some of them."""

    def attention(self, layer: int, *, softmax: bool = True) -> Tensor:
        """(1, N) fp32: what the last row of the prompt attends to in a layer, mean over heads, nothing removed.

        Without `softmax` the scaled products of its query and the keys. A further forward up to that layer, over this
        turn's rows alone. `Read("layer", layer, "attention")`.
        """

    @property
    def loss(self) -> Tensor:
        """(1, N) fp32: -log p of each token after those before it, by the model itself, nothing removed.

        A further forward, over this turn's rows alone; 0 of a first token. `LOSS`.
        """


class Patches(Protocol):
    """n images (crops, frames) of one token grid, before the first block of the vision tower."""

    pixels: Tensor  # (n, N, C), as of `Tokens`
    grid: tuple[int, int]  # (h, w), row-major: h * w == N


class Block(Protocol):
    """The tokens of n images (crops, frames) inside the vision tower, after the attention of one block, before its MLP.

    All n have m tokens left; images with other counts are shown apart. Patches that become one token behind the tower
    stay and leave together: they are one token here too, with the mean of what they have. Nothing is computed before
    it is asked for.
    """

    index: int  # of the blocks in which the method acts, from 0
    steps: int  # how many these are: blocks up to the feature block, see `TowerMethod.reads`
    has_cls: bool  # token 0 is [CLS]; it must stay token 0
    memory: dict[str, Tensor]
    """What the method keeps for the next block, (n, m, ...) each: rows stay or leave with their tokens (a merged token
    has that of `kept`). Empty in the first block."""

    @property
    def module(self) -> nn.Module | None:
        """As of `Tokens`."""

    @property
    def losses(self) -> list[Tensor]:
        """Scalars appended here, by `TowerMethod.add`, are added to the loss: their mean over all images."""

    @property
    def hidden(self) -> Tensor:
        """(n, m, D) hidden states, m tokens still present ([CLS] included)."""

    @property
    def sizes(self) -> Tensor:
        """(n, m) float, how many original tokens each one stands for."""

    @property
    def keys(self) -> Tensor:
        """(n, m, d) head-mean keys of this block's attention."""

    @property
    def values(self) -> Tensor:
        """(n, H, m, d) values of this block's attention, per head."""

    def attention(self, *, rows: str = "cls", surrogate: str | None = None, logits: bool = False) -> Tensor:
        """(n, H, patches) fp32: the attention of this block on every token but [CLS]; see `Tokens.attention`.

        ln(size) is among the logits where tokens were merged, as it is in the block itself.

        Raises:
            ValueError: the tower has no [CLS] and there is no `surrogate`, or this block sees windows of images and
                `reads` does not name `Read("tower", EVERY, "attention")`.
        """
