"""What the engine asks of a family of ViTs. An adapter states facts; it holds no procedure.

B images, S tokens with the prefix ([CLS], registers), N of them patches, C width, H heads of d.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from vtprune.errors import UnsupportedError
from vtprune.flops import Shape
from vtprune.types import (
    Attention,
    ClsRow,
    Facts,
    Flow,
    Guidance,
    Left,
    Maps,
    TowerNeed,
    WideClsRow,
)


class ViTAdapter(ABC):
    """One family of ViTs, whose blocks add attention and then an MLP to their input.

    Attributes:
        classes: names of the classes it serves, with the package first.
        block_types: names of the blocks whose halves it knows; others are refused.
        attention_types: the same of the attention in them.
        takes: what blocks are given after the states, in order.
        whole: methods that put the outputs of blocks in their places in the image.
        records: whether ``forward`` gives hidden states and attentions when asked to.
    """

    classes: ClassVar[tuple[str, ...]] = ()
    block_types: ClassVar[tuple[str, ...]] = ()
    attention_types: ClassVar[tuple[str, ...]] = ()
    takes: ClassVar[tuple[str, ...]] = ()
    whole: ClassVar[tuple[str, ...]] = ()
    records: ClassVar[bool] = False

    def __init__(self, tower: Any, model: Any) -> None:
        """Looks at ``tower``, which is a part of ``model`` or the same."""
        self.tower, self.model = tower, model
        for block in self.blocks:
            self._refuse(block, self.block_types)
            self._refuse(self.attention(block), self.attention_types)
        self._check()

    def _refuse(self, module: nn.Module, known: Sequence[str]) -> None:
        if type(module).__name__ not in known:
            raise UnsupportedError(
                f"{type(self.tower).__name__} has a {type(module).__name__} in its blocks, whose "
                f"halves are not known; known are {', '.join(known)}. Use a model made of those."
            )

    def _check(self) -> None:
        """Raises UnsupportedError for a configuration that cannot work."""
        return

    @property
    def facts(self) -> Facts:
        """What strategies may know."""
        depth = len(self.blocks)
        kinds = {k for k in Facts.signals_of(cls_row=self.has_cls) if issubclass(k, TowerNeed)}
        kinds |= {Attention, Left, Maps}
        if self.n_prefix and not self.has_cls:
            kinds -= {Flow, Guidance, ClsRow, WideClsRow}
        return Facts(
            depth,
            depth - 1,
            self.has_cls,
            frozenset(kinds),
            n_tokens=self.n_patches,
            family=type(self.tower).__name__,
            width=self.shape.width,
        )

    # -- the tower -----------------------------------------------------------------------------

    @property
    @abstractmethod
    def blocks(self) -> Sequence[Any]:
        """The blocks, in order; each takes and gives ``[B, S, C]``."""

    @property
    @abstractmethod
    def n_prefix(self) -> int:
        """Tokens before the first patch."""

    @property
    @abstractmethod
    def has_cls(self) -> bool:
        """Whether the first token is [CLS]."""

    @property
    def n_patches(self) -> int | None:
        """Patches of every image, None where they depend on it."""
        return None

    @property
    def shape(self) -> Shape:
        """The operations of the blocks; all matrices of an MLP, gated or not, count as two."""
        block = self.blocks[0]
        matrices = [m for m in block.mlp.modules() if isinstance(m, nn.Linear)]
        width = matrices[0].in_features
        ffn = sum(m.in_features * m.out_features for m in matrices) // (2 * width)
        attention = self.attention(block)
        heads = getattr(attention, "num_heads", None) or attention.num_attention_heads
        return Shape(width, ffn, len(self.blocks), False, heads * attention.head_dim)

    # -- a block by halves ---------------------------------------------------------------------

    @abstractmethod
    def attention(self, block: Any) -> Any:
        """Returns the attention module of a block."""

    @abstractmethod
    def norm(self, block: Any, x: Tensor) -> Tensor:
        """Returns what enters attention, ``[B, S, C]``."""

    @abstractmethod
    def project(self, attention: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns queries, keys and values ``[B, H, S, d]``, before a rotary embedding."""

    def turn(self, attention: Any, x: Tensor, rope: Tensor) -> Tensor:
        """Returns queries or keys after the rotary embedding."""
        raise UnsupportedError(f"{type(attention).__name__} was given a rotary embedding.")

    def dropout(self, attention: Any) -> float:
        """Returns the share of attention that training drops."""
        return attention.attn_drop.p

    @abstractmethod
    def attended(self, block: Any, out: Tensor, x: Tensor) -> Tensor:
        """Returns what attention adds to the states, ``[B, S, C]``.

        Args:
            out: ``[B, S, H * d]``, heads side by side.
            x: what ``norm`` returned.
        """

    @abstractmethod
    def passed(self, block: Any, x: Tensor) -> Tensor:
        """Returns what the MLP, with its norm, adds to the states ``[B, S, C]``."""

    # -- what comes after ----------------------------------------------------------------------

    @property
    def means(self) -> tuple[tuple[Any, str], ...]:
        """Methods that take states first and return means over patches, by module and name."""
        return ()

    @property
    def mean_has_prefix(self) -> bool:
        """Whether the means are over the prefix too."""
        return False

    @property
    def poolers(self) -> Mapping[nn.Module, str]:
        """Modules that attend to the patches, with the name by which they take a mask."""
        return {}

    @property
    def averages_output(self) -> bool:
        """Whether ``model`` takes the mean over the patches of the tower's output by itself."""
        return False
