"""What a strategy can ask of a model: the needs, and the facts it may know beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vtprune.errors import UnsupportedError


class Need:
    """Something that a strategy reads besides the tokens."""


@dataclass(frozen=True)
class Quantity(Need):
    """A value per token, from layer ``layer`` (0-based)."""

    layer: int


class TowerNeed(Quantity):
    """A quantity of a block of the vision tower, reduced while that block runs."""


class DecoderNeed(Quantity):
    """A quantity of a layer of the language model.

    A stage before that very layer reads what the layer would compute if no token left.
    """


class Attended(DecoderNeed):
    """Attention of some tokens to each visual token, in one form or another."""


class LastRow(Attended):
    """Attention of the last prompt token to each visual token, mean over heads. ``[B, N]`` float32.

    The softmax runs over all tokens of the prompt that are still there.
    """


class TextRows(Attended):
    """As ``LastRow``, but mean over all tokens after the last visual one. ``[B, N]`` float32.

    That is, over the instruction; where nothing comes after, the last token alone. Each of them
    sees what the layer lets it see.
    """


class VisualRows(Attended):
    """As ``LastRow``, but mean over all visual tokens. ``[B, N]`` float32.

    Each of them sees what the layer lets it see. They are taken 256 at a time.
    """


class EachText(Attended):
    """As ``TextRows``, but each of those tokens by itself, in their order. ``[B, N, T]`` float32.

    A row of the batch that has fewer ends with zeros. All of it is held for the whole call.
    """


class EachHead(EachText):
    """As ``EachText``, but each head by itself. ``[B, N, T, H]`` float32."""


class TextPeak(Attended):
    """As ``TextRows``, but the most of any of those tokens and any head. ``[B, N]`` float32."""


class Spans(DecoderNeed):
    """What each visual token is made of, whatever the layer. ``[B, N, 3]`` float32.

    Of which image or video of its sample (0-based), of that its first frame, and its last; the
    frames of images, and of videos of one frame, are -1.
    """


class Likeness(DecoderNeed):
    """How much the visual tokens are like each token after the last of them. ``[B, N]`` float32.

    Each visual token is shared out among those by the softmax of products of the hidden states that
    enter the layer; the mean over visual tokens. 0 of all others.
    """


class Turned(DecoderNeed):
    """What the layer's rotary embedding makes of a query of ones. ``[B, N, d]`` float32."""


class LayerKeys(DecoderNeed):
    """Mean over heads of each token's keys, as attention uses them. ``[B, N, d]`` float32."""


class LastFlow(Attended):
    """Score of each visual token as ``Flow`` has it, for the last prompt token. ``[B, N]`` float32.

    Its query takes the place of that of CLS, and its value, here with the scale ``d ** -0.5``. Both
    softmaxes run over the visual tokens that are still there, and over no others.
    """


class KeyNorm(DecoderNeed):
    """L1 norm of each token's keys over all heads, as attention uses them. ``[B, N]`` float32."""


class Normed(DecoderNeed):
    """Hidden states that enter the layer, after the model's last norm. ``[B, N, D]`` float32."""


class RowNeed(DecoderNeed):
    """A quantity of a sample as a whole: leading dimension ``[B]``, none of tokens."""


class FirstState(RowNeed):
    """Hidden states that enter the layer, of the first token that is there. ``[B, D]`` float32."""


class TextState(RowNeed):
    """Hidden states that enter the layer, after the last visual token. ``[B, 2 D]`` float32.

    Their mean without the last of them, and the last, side by side; one alone is both. Where
    nothing comes after, it is the last token.
    """


@dataclass(frozen=True)
class Transition(DecoderNeed):
    """How much the layer turns and stretches each token. ``[B, N]`` float32.

    The sum, over attention and MLP, of the norm of what goes out (before the residual addition) by
    that of what goes in, times the softmax, over all tokens of the sample that are still there, of
    1 less the cosine between the two; with ``abs_cos`` less its absolute value. It is read while
    the layer runs, so for stages after it.
    """

    abs_cos: bool = False


# What any language model gives.
INSIDE: frozenset[type] = frozenset(
    {LastRow, TextRows, TextPeak, VisualRows, EachText, EachHead, LastFlow}
    | {KeyNorm, LayerKeys, Normed, Likeness, FirstState, Spans, TextState, Turned, Transition}
)


class ClsRow(TowerNeed):
    """Attention of the CLS query to each patch, mean over heads. ``[B, N]`` float32.

    The softmax runs over all keys, CLS included.
    """


class Received(TowerNeed):
    """Attention that each patch receives. ``[B, N]`` float32.

    Mean over heads and over all queries, CLS among them.
    """


class TotalReceived(Received):
    """As ``Received``, but the sum over queries. ``[B, N]`` float32.

    Added up over blocks, it counts what was received where more tokens asked.
    """


class Keys(TowerNeed):
    """Mean over heads of the keys of each patch, as attention uses them. ``[B, N, d]`` float32.

    That is after a norm or a rotary embedding of the tower. In a ViT by itself it is before a
    rotary embedding: they say what is there, not where.
    """


class Patches(TowerNeed):
    """Each patch as it leaves the block. ``[B, N, C]`` float32."""


class Tile(TowerNeed):
    """Of which tile of its image each token is, whatever the block. ``[B, N]`` float32.

    Counted from 0, the base view. Frames of a video are no tiles: 0 of all; so it is where a token
    is made of several tiles.
    """


class Joint(TowerNeed):
    """Each patch in the space that a tower shares with its text tower. ``[B, N, d]`` float32.

    Of CLIP: the block's output through the last norm and the visual projection. ``Signals.text``
    then holds embeddings of that text tower, one for each piece of text.
    """


class Maps(TowerNeed):
    """Attention of each head, from query to key, of all tokens of the block: ``[B, H, S, S]``.

    float32; the prefix is among the S tokens. Only a ViT by itself gives it, and only to a stage in
    or right after that block.
    """


@dataclass(frozen=True)
class Left(TowerNeed):
    """What the rule of that block's attention left with each patch, ``[B, N, ...]``, by its name.

    Only a ViT by itself has such rules.
    """

    name: str


class WideClsRow(TowerNeed):
    """As ``ClsRow``, with the block's heads joined into one, as wide as all. ``[B, N]`` float32."""


class WideKeys(TowerNeed):
    """Keys of each patch, those of all heads side by side. ``[B, N, H * d]`` float32."""


class Guidance(TowerNeed):
    """Cosine of each patch's key with the query of the last prefix token. ``[B, N]`` float32.

    Keys and queries of all heads are side by side. That token is CLS, or a guest of the strategy;
    in a tower without a prefix the mean query takes its place.
    """


class ValueNorm(TowerNeed):
    """L2 norm of each patch's values, those of all heads side by side. ``[B, N]`` float32."""


class Flow(TowerNeed):
    """Two values of each patch, ``[B, N, 2]`` float32: its relation to CLS, and its score.

    The relation is its share of the attention of the CLS query. The score adds its share of the
    similarity to the value of CLS (softmax of products of values, without a scale; both are means
    over heads), and multiplies by the L1 norm of its own value, mean over heads. Without a CLS
    the mean query and the mean value take its place.
    """


@dataclass(frozen=True)
class Attention(Need):
    """Attention itself, for which a rule of the strategy stands. Only a ViT by itself lets it."""


@dataclass(frozen=True)
class InstructionText(Need):
    """Language-model embeddings of the instruction's words; ``Signals.text`` holds them."""


@dataclass(frozen=True)
class Frames(Need):
    """Videos, whose tokens have a grid ``(t, h, w)``, so that frames can be compared."""


@dataclass(frozen=True)
class Facts:
    """What a strategy may know of a model before it runs.

    Attributes:
        vision_layers: number of blocks in the vision tower.
        feature_block: 0-based block whose output is projected.
        has_cls: whether the tower has a CLS token (index 0 of its sequence).
        signals: the kinds of needs that the adapter can give.
        n_tokens: visual tokens of every image, or None where they depend on the image.
        decoder_layers: number of layers of the language model; 0 = stages cannot act inside it.
        first_stage: lowest layer of the language model before which tokens may leave.
        full_blocks: blocks whose attention spans the whole image or frame, None = all. The others
            see windows and give no signal.
        in_tower: whether tokens can be reduced inside the tower: a visual token is one patch.
        mrope: whether position ids have several axes, so that renumbering makes no sense.
        family: name used in messages.
        width: of the hidden states of the tower, None where that is not said.
        decoder_width: of those of the language model, likewise.
    """

    vision_layers: int
    feature_block: int
    has_cls: bool
    signals: frozenset[type]
    n_tokens: int | None = None
    decoder_layers: int = 0
    first_stage: int = 1
    full_blocks: tuple[int, ...] | None = None
    in_tower: bool = True
    mrope: bool = False
    family: str = "this model"
    width: int | None = None
    decoder_width: int | None = None

    @staticmethod
    def signals_of(*, cls_row: bool) -> frozenset[type]:
        """Returns the signals of an ordinary tower, with or without a CLS token."""
        kinds = {Received, TotalReceived, Keys, Flow, Guidance, Patches, ValueNorm}
        kinds |= {InstructionText, *INSIDE}
        kinds |= {WideKeys, WideClsRow} if cls_row else {WideKeys}
        return frozenset(kinds | {ClsRow} if cls_row else kinds)

    def scale(self, layer: int, depth: int) -> int:
        """Maps block ``layer`` of a tower with ``depth`` blocks to this tower."""
        return min(round(layer * self.vision_layers / depth), self.vision_layers - 1)

    def scale_decoder(self, layer: int, depth: int) -> int:
        """Maps layer ``layer`` > 0 of a language model with ``depth`` layers to this one."""
        scaled = round(layer * self.decoder_layers / depth)
        return max(self.first_stage, min(scaled, self.decoder_layers - 1))

    def readable(self, block: int) -> int:
        """Returns the last block up to ``block`` that gives signals, or the first that does."""
        if self.full_blocks is None:
            return block
        return max((b for b in self.full_blocks if b <= block), default=min(self.full_blocks))


def check_needs(needs: Sequence[Need], facts: Facts, name: str) -> None:
    """Raises UnsupportedError when the model cannot give one of ``needs``."""
    for need in needs:
        if type(need) not in facts.signals:
            have = ", ".join(sorted(kind.__name__ for kind in facts.signals)) or "no signal"
            raise UnsupportedError(
                f"{name} needs {need}; {facts.family} gives only {have}. Use a strategy that needs "
                "no such signal, such as 'divprune' or 'random'."
            )
