"""CrossGET: what it reads where, the token that guides it, and trained ones from a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import vtprune
from tests.golden_harness import GoldenError, check, find_adapter, find_cases
from tests.test_golden import SHIPPED
from tests.vits.models import DEPTH, answer, assert_one_graph, build, images, wrap
from vtprune.errors import ConfigError, UnsupportedError
from vtprune.registry import build as strategy
from vtprune.scoring import complete
from vtprune.strategies.crossget import CrossGET
from vtprune.types import (
    ClsRow,
    Facts,
    Guidance,
    Keys,
    Maps,
    Received,
    Selection,
    Signals,
    WideKeys,
)

TOWER = Facts(24, 22, True, Facts.signals_of(cls_row=True), decoder_layers=32)
ALONE = Facts(12, 11, True, Facts.signals_of(cls_row=True) | {Maps})


def test_wide_keys_and_a_guide_in_a_vit_by_itself_means_in_a_tower() -> None:
    stages = strategy("crossget").plan(ALONE)
    assert [stage.layer for stage in stages] == list(range(12))
    assert all(s.before_mlp and s.proportional for s in stages)
    assert stages[2].needs == (WideKeys(2), Guidance(2))
    guests = strategy("crossget").guests(ALONE)
    assert guests is not None and len(guests) == 12 and not guests.any()
    for made in (strategy("crossget"), strategy("crossget", metric="mean")):
        assert made.plan(TOWER)[2].needs == (Keys(2), Received(2), ClsRow(2))
        assert made.guests(TOWER) is None
    bare = replace(TOWER, has_cls=False, signals=Facts.signals_of(cls_row=False))
    assert strategy("crossget").plan(bare)[0].needs == (Keys(0), Received(0))
    assert strategy("crossget").guests(replace(ALONE, has_cls=False)) is None


def test_the_guide_is_a_copy_of_cls_with_what_it_learned(tmp_path: Path) -> None:
    """What is seen of block 1 is the cosine with the query of that very token."""
    seen: dict[str, Tensor] = {}

    class Looks(CrossGET):
        def select(self, signals: Signals, k: int) -> Selection:
            seen["guidance"] = signals.stack(Guidance)[-1]
            return super().select(signals, k)

    model, x = build("vit"), images()
    learned = torch.randn(DEPTH, 48, generator=torch.Generator().manual_seed(0))
    save_file({"tokens": learned}, tmp_path / "crossget_tokens.safetensors")
    answers: list[Tensor] = []
    for tokens in (None, str(tmp_path)):
        with wrap(model, Looks(tokens=tokens), reduce=[8]) as handle:
            entering: list[Tensor] = []
            hook = model.norm_pre.register_forward_hook(
                lambda m, a, out, to=entering: to.append(out)
            )
            answers.append(answer(model, x))
            hook.remove()
            assert handle.report().tiles[0].passed[0] == 65 + 1 - 8
        block, h = model.blocks[0], entering[0]
        added = torch.zeros(48) if tokens is None else learned[0]
        with torch.no_grad():
            guide = block.attn.qkv(block.norm1(h[:, :1] + added))[..., :48]
            keys = block.attn.qkv(block.norm1(h[:, 1:]))[..., 48:96]
        cosine = torch.cosine_similarity(keys, guide, dim=-1)
        torch.testing.assert_close(seen["guidance"], cosine, rtol=1e-4, atol=1e-5)
    assert not torch.equal(*answers)


def test_tokens_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    model: Any = build("vit")
    path = tmp_path / "crossget_tokens.safetensors"
    assert strategy("crossget").beside(str(tmp_path)) == strategy("crossget")
    save_file({"tokens": torch.zeros(DEPTH + 1, 48)}, path)
    assert strategy("crossget").beside(str(tmp_path)) == strategy("crossget", tokens=str(path))
    with pytest.raises(ConfigError, match=f"are for {DEPTH + 1} blocks of width 48; .* {DEPTH} of"):
        vtprune.wrap(model, "crossget", reduce=8, tokens=str(tmp_path))
    with pytest.raises(ConfigError, match=rf"tokens=\[{DEPTH}, 40\] are for .* of width 48"):
        vtprune.wrap(model, "crossget", reduce=8, tokens=torch.zeros(DEPTH, 40))
    with pytest.raises(ConfigError, match=rf"tokens=\[{DEPTH}\]: no 'tokens'"):
        vtprune.wrap(model, "crossget", reduce=8, tokens=torch.zeros(DEPTH))
    save_file({"other": torch.zeros(DEPTH, 48)}, path)
    with pytest.raises(ConfigError, match=r"no .tokens. \[blocks, width\]"):
        vtprune.wrap(model, "crossget", reduce=8, tokens=str(path))
    path.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="is no safetensors file"):
        vtprune.wrap(model, "crossget", reduce=8, tokens=str(path))
    with pytest.raises(ConfigError, match="neither a file"):
        vtprune.wrap(model, "crossget", reduce=8, tokens=str(tmp_path / "absent"))
    with pytest.raises(UnsupportedError, match="by itself that has a"):
        strategy("crossget", tokens=str(path)).plan(TOWER)


@pytest.mark.parametrize(
    "options", [{"metric": "narrow"}, {"metric": "mean", "tokens": "mini-vit"}]
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="metric="):
        strategy("crossget", **options)


@pytest.mark.parametrize("name", ["vit", "siglip_map", "open_clip"])
@pytest.mark.slow
def test_it_compiles_to_one_graph(name: str) -> None:
    model, x = build(name), images()
    with wrap(model, "crossget", reduce=8):
        assert_one_graph(model, x)


def test_faults_turn_the_recorded_cases_red(monkeypatch: pytest.MonkeyPatch) -> None:
    adapter, cases = find_adapter("crossget"), find_cases(SHIPPED / "crossget")
    assert not isinstance(adapter, str)
    real = complete.guided

    def plain(stays: Tensor, leaves: Tensor, partner: Tensor, worth: Tensor, size: Tensor) -> Any:
        return real(stays, leaves, partner, torch.ones_like(worth), size)

    faults = {"guided": plain, "redundancy_rank": lambda x: x.argsort(dim=1).argsort(dim=1)}
    for name, fault in faults.items():
        with monkeypatch.context() as patch:
            patch.setattr(complete, name, fault)
            for case in cases:
                with pytest.raises(GoldenError, match="differs"):
                    check(case, adapter)
