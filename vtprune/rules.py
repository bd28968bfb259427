"""What the visual rows of a prompt compute in one layer of the language model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from torch import Tensor

from vtprune.errors import ConfigError
from vtprune.needs import TowerNeed

Attend = Literal["all", "window", "self", "none", "chosen"]
Others = Literal["keep", "drop", "pack"]
BITS = (1, 2, 4, 8)


class Chooser(Protocol):
    """What chooses, in a layer and for one prompt, the tokens that attend."""

    @property
    def share(self) -> float:
        """Most of the tokens that it chooses of many, as a share."""
        ...

    def asking(self, n: int) -> Tensor:
        """Returns by which of ``n`` tokens it chooses, ``[M]`` int64, ascending."""
        ...

    def choose(self, q: Tensor, k: Tensor, seen: Tensor, scale: float | None) -> Tensor:
        """Returns which tokens attend and are seen, ``[n]`` bool; all but visual ones do anyway.

        Args:
            q: ``[1, H, M, d]`` queries of those that it asks.
            k: ``[1, Hkv, n, d]`` keys of a whole prompt, without padding.
            seen: ``[M, n]`` bool, which keys each query sees.
            scale: factor of the products; None = ``d ** -0.5``.
        """
        ...

    def choose_again(self, q: Tensor, k: Tensor, scale: float | None, new: int) -> Tensor:
        """Returns which of the last ``new`` tokens still matter, ``[new]`` bool.

        Args:
            q: ``[1, H, 1, d]`` query of the very last one.
            k: ``[1, Hkv, n, d]`` keys of all tokens that it sees; ``scale`` as above.
        """
        ...


class Maker(Protocol):
    """What makes the visual tokens of a layer, whatever they were before it."""

    @property
    def need(self) -> TowerNeed:
        """What it makes them of."""
        ...

    def make(self, features: Tensor, width: int) -> Tensor:
        """Returns ``[M, width]`` of what ``need`` reads of M tokens, ``[M, ...]``."""
        ...

    def macs(self) -> int:
        """Returns its multiply-accumulates for one token."""
        ...


@dataclass(frozen=True)
class RowRule:
    """What visual rows do while the prompt is read; tokens decoded later find whole keys.

    Unless ``others`` drop or pack. Text rows are as ever and see all visual keys. The default
    changes nothing.

    Attributes:
        attend: what visual rows see: ``all`` as usual; of visual keys only a ``window`` in their
            own image or frame, to both sides, and the text before them; each row ``self`` alone;
            ``none``, so that attention adds nothing to them; or, of those ``chosen``, as
            usual but for the other visual ones, which have ``none`` and are seen by nobody.
        mlp: share of the MLP's hidden neurons that visual rows pass, the first ones; 0 = the MLP
            adds nothing to them. With ``attend="none"`` they then leave the layer as they came.
        radius: of the window, in tokens; 1 = with the eight neighbours.
        heads: 0-based key/value heads, with the queries that share them, in which visual rows see
            and give something. In the others their values and what they attend to are 0. None =
            all.
        read: whether visual values count at all for who sees them.
        chooser: what chooses, if ``attend="chosen"``.
        others: what becomes in the cache of tokens that are not chosen: they ``keep`` as they are,
            ``drop`` out, so that tokens decoded later do not see them either, or ``pack``: into few
            bits, and so do the chosen ones.
        bits: numbers of bits of packed tokens, of the chosen ones and of the others.
        every: after so many decoded tokens it is chosen which of those matter, and the others drop
            or pack too; None = never.
        maker: what makes the tokens that enter the layer; None = they are what leaves the layer
            before it. Those made of no patch are that anyway.
    """

    attend: Attend = "all"
    mlp: float = 1.0
    radius: int = 0
    heads: tuple[int, ...] | None = None
    read: bool = True
    chooser: Chooser | None = None
    others: Others = "keep"
    bits: tuple[int, int] = (4, 2)
    every: int | None = None
    maker: Maker | None = None

    def __post_init__(self) -> None:
        if self.attend not in get_args(Attend):
            known = ", ".join(map(repr, get_args(Attend)))
            raise ConfigError(f"attend={self.attend!r} is unknown; choose one of {known}.")
        if not (math.isfinite(self.mlp) and 0 <= self.mlp <= 1):
            raise ConfigError(f"mlp={self.mlp!r} is no share of the MLP; give one of 0 to 1.")
        if self.radius < 0:
            raise ConfigError(f"radius={self.radius} must be at least 0.")
        if (self.attend == "chosen") != (self.chooser is not None):
            raise ConfigError(
                f"attend={self.attend!r} with chooser={self.chooser}: attend='chosen' and a "
                "chooser go together. Give both or none."
            )
        self._check_cache()

    def _check_cache(self) -> None:
        if self.others not in get_args(Others):
            known = ", ".join(map(repr, get_args(Others)))
            raise ConfigError(f"others={self.others!r} is unknown; choose one of {known}.")
        if self.others != "keep" and self.chooser is None:
            raise ConfigError(f"others={self.others!r} are those not chosen; give a chooser too.")
        bits = self.bits if isinstance(self.bits, tuple) else ()
        if len(bits) != 2 or any(type(n) is not int or n not in BITS for n in bits):
            raise ConfigError(
                f"bits={self.bits!r}: give those of chosen and of other tokens, two of {BITS}."
            )
        if self.every is not None and (type(self.every) is not int or self.every < 1):
            raise ConfigError(f"every={self.every!r} is no number of tokens; give 1 or more.")

    @property
    def needs(self) -> tuple[TowerNeed, ...]:
        """What has to be read in the tower."""
        return () if self.maker is None else (self.maker.need,)

    def macs(
        self, tokens: int, width: int, ffn: int, heads: int = 1, chosen: int | None = None
    ) -> float:
        """Returns multiply-accumulates of ``tokens`` visual tokens alone, by the published formula.

        That is 4 n d^2 + 2 n^2 d + 3 n d m for a whole layer, whose queries, keys, values and
        output count alike (the formula knows no shared key/value heads), and what makes them.

        Args:
            width: d, of the hidden states; ``ffn``: m, of the gated MLP.
            heads: key/value heads of the layer.
            chosen: tokens that attend where some are ``chosen``; None = most that could.
        """
        share = 1.0 if self.heads is None else len(self.heads) / heads
        seen: dict[str, float] = {"all": tokens, "window": min(tokens, (2 * self.radius + 1) ** 2)}
        if self.chooser is not None:
            most = self.chooser.share * tokens if chosen is None else chosen
            seen["chosen"] = most**2 / max(1, tokens)
        made = {"none": 2, "self": 3}.get(self.attend, 4)  # of queries, keys, values, output
        rows = made * share * width**2 + 2 * seen.get(self.attend, 0) * width
        making = 0 if self.maker is None else self.maker.macs()
        return tokens * (making + rows + 3 * self.mlp * width * ffn)

    def __str__(self) -> str:
        side = 2 * self.radius + 1
        words = {"none": "no attention", "self": "attend to themselves alone"}
        words["window"] = f"attend within {side} x {side}"
        words["chosen"] = f"attend if chosen by {self.chooser}"
        said = [words[self.attend]] if self.attend in words else []
        if self.mlp < 1:
            said.append(f"{self.mlp:.3g} of the MLP" if self.mlp else "no MLP")
        if self.heads is not None:
            said.append(f"{len(self.heads)} key/value heads")
        if not self.read:
            said.append("values unread")
        if self.maker is not None:
            said.append(str(self.maker))
        return ", ".join(said) or "as ever"
