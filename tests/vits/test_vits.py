"""Reduction in ViTs: nothing reduced is the model itself, merging is duplicating, undo is whole."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.vits.models import (
    NAMES,
    PATCHES,
    ROPE,
    answer,
    build,
    images,
    wrap,
)
from vtprune.engine import vit as engine
from vtprune.engine import vit_state
from vtprune.engine.vit_handle import ViTHandle


@pytest.mark.parametrize("name", NAMES)
def test_reducing_nothing_is_the_model_bit_for_bit(name: str) -> None:
    model, x = build(name), images()
    plain = answer(model, x)
    for amount in ({"reduce": 0}, {"keep": 1.0}, {"keep": PATCHES}, {"reduce": [0, 0]}):
        with wrap(model, "tome", **amount) as handle:
            assert torch.equal(answer(model, x), plain)
            assert handle.report().images[0].kept == PATCHES
            assert [s.is_identity for s in handle.selections] == [True, True]
    assert torch.equal(answer(model, x), plain)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_by_halves_are_the_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build(name), images()
    plain = answer(model, x)
    monkeypatch.setattr(engine.Passage, "_acts", lambda *args: True)
    with wrap(model, "tome", reduce=0):
        torch.testing.assert_close(answer(model, x), plain, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def answer_after(handle: ViTHandle, first: Tensor, x: Tensor, places: Tensor) -> Tensor:
    """The unwrapped model's answer where block 0 is made to give ``first``.

    ``places`` ``[B, n]`` are those of its patches, for the rotary embedding of later blocks.
    """
    adapter = handle.adapter

    def turned(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        rope = kwargs.get("rope")
        if rope is not None:
            picked = rope[places][:, None] if rope.ndim == 2 else rope[:, places].transpose(0, 1)
            kwargs = {**kwargs, "rope": picked}
        return args, kwargs

    with ExitStack() as undo:
        hook = adapter.blocks[0].register_forward_hook(lambda *args: first)
        undo.callback(hook.remove)
        for block in adapter.blocks[1:]:
            hook = block.register_forward_pre_hook(turned, with_kwargs=True)
            undo.callback(hook.remove)
        return answer(handle.model, x)


def merged_in_the_first(model: Any, x: Tensor, strategy: Any = "tome") -> tuple[Any, ...]:
    """The answer with a merge in block 0 alone, and what that block made."""
    seen: list[Tensor] = []
    handle = wrap(model, strategy, reduce=[24])
    block = handle.adapter.blocks[0]
    hook = block.register_forward_hook(lambda module, args, out: seen.append(out))
    reduced = answer(model, x)
    state = handle._passage.entering[1]
    hook.remove()
    handle.remove()
    return handle, reduced, seen[0], state


def duplicated(handle: ViTHandle, made: Tensor, state: vit_state.State, x: Tensor) -> Tensor:
    p = handle.adapter.n_prefix
    assert state.owner is not None and state.index is not None
    rows = state.owner[..., None].expand(-1, -1, made.shape[-1])
    first = torch.cat([made[:, :p], made[:, p:].gather(1, rows)], dim=1)
    return answer_after(handle, first, x, state.index.gather(1, state.owner))


@pytest.mark.parametrize("name", NAMES)
def test_merging_is_duplicating(name: str) -> None:
    model, x = build(name), images()
    handle, reduced, made, state = merged_in_the_first(model, x)
    assert made.shape[1] == PATCHES - 24 + handle.adapter.n_prefix
    torch.testing.assert_close(reduced, duplicated(handle, made, state, x), rtol=1e-5, atol=1e-5)


def _no_bias(*args: Any) -> None:
    return None


def _first_of(rope: Tensor, index: Tensor | None) -> Tensor:
    return rope if index is None else rope[: index.shape[1]]


FAULTS: dict[str, tuple[str, Any, str]] = {
    "no weight in blocks": ("vit_attention.added", _no_bias, "vit"),
    "rope not gathered": ("vit_attention.left_of", _first_of, "eva02_fused"),
    "plain mean": ("vit.Passage.weigh", lambda self, x: x, "siglip_gap"),
    "plain pooler": ("vit.Passage.bias", lambda self, length: None, "siglip_map"),
    "plain mean of the output": (
        "vit.Passage.weigh",
        lambda self, x: x,
        "Dinov2ForImageClassification",
    ),
    "plain pooler of torch": ("vit.Passage.bias", lambda self, length: None, "SiglipVisionModel"),
    "plain pooler of CoCa": ("vit.Passage.bias", lambda self, length: None, "open_clip_coca"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_turn_the_oracle_red(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, replacement, name = FAULTS[fault]
    model, x = build(name), images()
    monkeypatch.setattr(f"vtprune.engine.{where}", replacement)
    handle, reduced, made, state = merged_in_the_first(model, x)
    assert not torch.allclose(reduced, duplicated(handle, made, state, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vit", "registers", *ROPE, "open_clip", "CLIPVisionModel"])
@pytest.mark.parametrize("strategy", ["random", "strided"])
def test_dropping_is_gathering(name: str, strategy: str) -> None:
    model, x = build(name), images()
    handle, reduced, made, state = merged_in_the_first(model, x, strategy)
    assert state.sizes is None and state.index is not None
    expected = answer_after(handle, made, x, state.index)
    torch.testing.assert_close(reduced, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "dinov3", "open_clip", "SiglipVisionModel"])
def test_every_patch_is_in_one_token(name: str) -> None:
    model, x = build(name), images(3)
    with wrap(model, "tome", reduce=10) as handle:
        answer(model, x)
        for state, n in zip(handle._passage.entering[1:], (54, 44, 34), strict=True):
            assert state.sizes is not None and state.owner is not None
            assert state.sizes.sum(1).tolist() == [PATCHES] * 3
            counted = torch.stack([row.bincount(minlength=n) for row in state.owner])
            assert torch.equal(counted.float(), state.sizes)
        for selection in handle.selections:
            assert selection.rows.shape == (1, 34) and selection.mix is not None
            assert torch.equal(selection.rows, selection.rows.sort().values)
            assert float(selection.apply(torch.ones(1, PATCHES, 1)).sub(1).abs().max()) < 1e-6
        report = handle.report()
        p = handle.adapter.n_prefix
        assert report.tiles[0].attended == (64 + p, 54 + p, 44 + p)
        assert report.tiles[0].passed == (54 + p, 44 + p, 34 + p)
        assert 0 < report.tower().share < 1 and "34 of 64" in str(report)
