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


class LastRow(DecoderNeed):
    """Attention of the last prompt token to each visual token, mean over heads. ``[B, N]`` float32.

    The softmax runs over all tokens of the prompt that are still there.
    """


class ClsRow(TowerNeed):
    """Attention of the CLS query to each patch, mean over heads. ``[B, N]`` float32.

    The softmax runs over all keys, CLS included.
    """


class Received(TowerNeed):
    """Attention that each patch receives. ``[B, N]`` float32.

    Mean over heads and over all queries, CLS among them.
    """


class Keys(TowerNeed):
    """Mean over heads of the keys of each patch. ``[B, N, d]`` float32."""


@dataclass(frozen=True)
class InstructionText(Need):
    """Language-model embeddings of the instruction's words; ``Signals.text`` holds them."""


@dataclass(frozen=True)
class Facts:
    """What a strategy may know of a model before it runs.

    Attributes:
        vision_layers: number of blocks in the vision tower.
        feature_block: 0-based block whose output is projected.
        has_cls: whether the tower has a CLS token (index 0 of its sequence).
        signals: the kinds of needs that the adapter can give.
        decoder_layers: number of layers of the language model; 0 = stages cannot act inside it.
        n_tokens: visual tokens of every image, or None where they depend on the image.
        family: name used in messages.
    """

    vision_layers: int
    feature_block: int
    has_cls: bool
    signals: frozenset[type]
    n_tokens: int | None = None
    decoder_layers: int = 0
    family: str = "this model"

    @staticmethod
    def signals_of(*, cls_row: bool) -> frozenset[type]:
        """Returns the signals of an ordinary tower, with or without a CLS token."""
        kinds = {Received, Keys, InstructionText, LastRow}
        return frozenset(kinds | {ClsRow} if cls_row else kinds)

    def scale(self, layer: int, depth: int) -> int:
        """Maps block ``layer`` of a tower with ``depth`` blocks to this tower."""
        return min(round(layer * self.vision_layers / depth), self.vision_layers - 1)

    def scale_decoder(self, layer: int, depth: int) -> int:
        """Maps layer ``layer`` > 0 of a language model with ``depth`` layers to this one."""
        return max(1, min(round(layer * self.decoder_layers / depth), self.decoder_layers - 1))


def check_needs(needs: Sequence[Need], facts: Facts, name: str) -> None:
    """Raises UnsupportedError when the model cannot give one of ``needs``."""
    for need in needs:
        if type(need) not in facts.signals:
            have = ", ".join(sorted(kind.__name__ for kind in facts.signals)) or "no signal"
            raise UnsupportedError(
                f"{name} needs {need}; {facts.family} gives only {have}. Use a strategy that needs "
                "no such signal, such as 'divprune' or 'random'."
            )
