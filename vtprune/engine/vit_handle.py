"""``wrap`` for a ViT: install a strategy in the blocks of this one instance, undo it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from vtprune.engine.instance import live, refuse_overlap, restore
from vtprune.engine.report import ImageReport, Report, TileReport
from vtprune.engine.vit import Passage
from vtprune.engine.vit_plan import Plan
from vtprune.engine.vit_state import selections
from vtprune.errors import UnsupportedError
from vtprune.types import Selection, Strategy
from vtprune.vit_adapters._base import ViTAdapter


@dataclass(frozen=True)
class _Named:
    """Says which strategy a handle is of."""

    strategy: Strategy


class ViTHandle:
    """A wrapped ViT. ``remove()`` (or leaving the ``with`` block) gives the original back.

    Outputs have as many tokens as are left, the prefix first; ``selections`` say of which patches.
    Where images are left different counts, rows are filled up behind with tokens that nobody sees.
    Methods that put the outputs of blocks in their places in the image give each patch what the
    token that it is in has become.
    """

    def __init__(self, model: nn.Module, adapter: ViTAdapter, plan: Plan) -> None:
        refuse_overlap(model)
        self.model, self.adapter, self.plan = model, adapter, plan
        self.steps = (_Named(plan.strategy),)
        self._passage = Passage(adapter, plan)
        self._undo = ExitStack()
        with ExitStack() as undo:  # a failure half-way leaves nothing behind
            self._install(undo)
            self._undo = undo.pop_all()
        live.add(self)

    def __enter__(self) -> ViTHandle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Takes everything off the model; a second call does nothing."""
        self._undo.close()
        live.discard(self)

    @property
    def selections(self) -> list[Selection]:
        """The last call's selection per image, each with a batch dimension of 1."""
        passage = self._passage
        return selections(passage.entering[-1], passage.batch, passage.patches)

    def report(self) -> Report:
        """Returns what the last call kept, per image, and its operations."""
        passage, plan = self._passage, self.plan
        n, asked = passage.patches, plan.budget.tokens or 0
        if not n:
            return Report(repr(plan.strategy), tuple(plan.stages))
        attended, passed = zip(*passage.counted, strict=True)
        shares = tuple(passage.shares) if any(s.attend for s in plan.stages.values()) else ()
        tile = TileReport(n + self.adapter.n_prefix, attended, passed, self.adapter.shape, shares)
        left = enumerate(passage.left)
        images = [ImageReport(row, n, count, asked > n) for row, count in left]
        return Report(
            repr(plan.strategy), tuple(plan.stages), tuple(images), tiles=(tile,) * passage.batch
        )

    # -- installing ----------------------------------------------------------------------------

    def _install(self, undo: ExitStack) -> None:
        adapter, passage = self.adapter, self._passage
        for layer, block in enumerate(adapter.blocks):
            _replace(undo, block, "forward", partial(passage.run, layer, block, block.forward))
        for name in adapter.whole:
            _replace(undo, adapter.tower, name, partial(self._whole, getattr(adapter.tower, name)))
        for module, name in adapter.means:
            _replace(undo, module, name, partial(self._mean, getattr(module, name)))
        for pooler, mask in adapter.poolers.items():
            _replace(undo, pooler, "forward", partial(self._pool, pooler.forward, mask))
        if adapter.records:
            _replace(undo, adapter.tower, "forward", partial(self._record, adapter.tower.forward))
        if adapter.averages_output:
            undo.callback(adapter.tower.register_forward_hook(self._scale).remove)

    def _whole(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self._in_places():
            return original(*args, **kwargs)

    def _record(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Gives hidden states of all patches; blocks by halves give no attentions."""
        asked = [
            name
            for name in ("output_attentions", "output_hidden_states")
            if kwargs.get(name, getattr(self.adapter.tower.config, name, False))
        ]
        if "output_attentions" in asked:
            raise UnsupportedError(
                "output_attentions=True: queries and keys become fewer from block to block. Leave "
                "it out, or remove() the handle for this call."
            )
        return self._whole(original, *args, **kwargs) if asked else original(*args, **kwargs)

    @contextmanager
    def _in_places(self) -> Iterator[None]:
        was, self._passage.whole = self._passage.whole, True
        try:
            yield
        finally:
            self._passage.whole = was

    def _mean(self, original: Callable[..., Any], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Lets a mean count every patch; what else is returned stays."""
        weighed = original(self._passage.weigh(x), *args, **kwargs)
        if isinstance(weighed, tuple):
            return weighed[0], *original(x, *args, **kwargs)[1:]
        return weighed

    def _pool(
        self, original: Callable[..., Any], mask: str, x: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Lets a pooler attend to a token as to all patches it stands for."""
        seen = args[0] if args else x
        bias = self._passage.bias(seen.shape[1])
        if bias is not None:
            bias = bias.to(seen.dtype)
            kwargs[mask] = bias[:, None, None] if mask == "attn_mask" else bias
        return original(x, *args, **kwargs)

    def _scale(self, module: nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = self._passage.weigh(output.last_hidden_state)
        return output


def _replace(undo: ExitStack, module: Any, name: str, replacement: Callable[..., Any]) -> None:
    undo.callback(restore(module, name))
    setattr(module, name, replacement)
