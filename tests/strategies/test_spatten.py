"""SpAtten in whole ViTs: what has been received so far, heads, values, bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vtprune
from tests.vits.models import PATCHES, answer, assert_one_graph, build, images, wrap
from vtprune.attending import Attending
from vtprune.errors import ConfigError, UnsupportedError
from vtprune.eval import tiny
from vtprune.strategies.spatten import Pruned, SpAtten
from vtprune.types import Facts


@torch.no_grad()
def cascade(model: Any, keep: list[int], heads: list[int], values: int) -> torch.Tensor:
    """The answer of a ViT of timm of 3 heads, patches and heads left out by hand, image by image.

    Args:
        keep: patches that each block leaves; heads: that each has; values: that a query reads.
    """
    answers = []
    for image in images():
        x = model.norm_pre(model._pos_embed(model.patch_embed(image[None])))[0]
        received, given = torch.zeros(len(x), dtype=torch.float64), torch.zeros(3)
        for block, n, h in zip(model.blocks, keep, heads, strict=True):
            q, k, v = block.attn.qkv(block.norm1(x)).unflatten(-1, (3, 3, 16)).permute(1, 2, 0, 3)
            a = (q @ k.mT / 4).softmax(-1)
            alive = given.sort(descending=True, stable=True).indices[:h]
            out = torch.zeros(3, len(x), 16)
            for head in alive:
                received += a[head].double().sum(0)
                best = a[head].sort(descending=True, stable=True).indices[:, :values]
                read = torch.zeros_like(a[head]).scatter(1, best, 1) * a[head]
                out[head] = read @ v[head]
                given[head] += out[head].abs().sum()
            given[[i for i in range(3) if i not in alive]] = -torch.inf
            x = x + block.attn.proj(out.transpose(0, 1).flatten(1))
            left = received[1:].sort(descending=True, stable=True).indices[:n].sort().values
            left = torch.cat([torch.zeros(1, dtype=torch.int64), left + 1])
            x, received = x[left], received[left]
            x = x + block.mlp(block.norm2(x))
        answers.append(model.forward_head(model.norm(x[None])))
    return torch.cat(answers)


@pytest.mark.parametrize(
    ("options", "keep", "heads", "values"),
    [
        ({}, 20, [3, 3, 3], 65),
        ({"heads": 0.3}, 20, [3, 2, 1], 65),
        ({"values": 0.2}, PATCHES, [3, 3, 3], 13),
    ],
)
def test_the_cascade_is_that_of_the_paper(
    options: dict[str, Any], keep: int, heads: list[int], values: int
) -> None:
    model = build("vit")
    # The first of three blocks is within the first 15 %, of heads within the first 30 %.
    left = [PATCHES, (PATCHES + keep) // 2, keep]
    with wrap(model, "spatten", keep=keep, **options) as handle:
        made = answer(model, images())
        assert handle.report().images[0].kept == keep
    torch.testing.assert_close(made, cascade(model, left, heads, values), rtol=1e-4, atol=1e-5)


def test_patches_leave_in_equal_steps_after_the_first_blocks() -> None:
    facts = Facts(12, 11, True, Facts.signals_of(cls_row=True), n_tokens=196)
    stages = SpAtten().plan(facts)
    assert [stage.layer for stage in stages] == list(range(2, 12))
    assert [len(stage.quantities) for stage in stages] == list(range(3, 13))
    shares = [stage.times(0.5) for stage in stages if callable(stage.times)]
    assert shares == pytest.approx([1 - 0.05 * i for i in range(1, 11)])
    rules = [s.attend for s in SpAtten(heads=0.75).plan(facts)]
    left = [round(rule.heads, 3) for rule in rules if isinstance(rule, Pruned)]
    assert left[:4] == [1] * 4
    assert left[4:] == [round(1 - i / 32, 3) for i in range(1, 9)]
    assert sum(left) / 12 == pytest.approx(1 / 1.1, abs=0.01)


def test_bits_are_simulated() -> None:
    model = build("vit")
    plain = answer(model, images())
    errors = []
    for bits in ((4, 0), (8, 0), (12, 4)):
        with wrap(model, "spatten", keep=1.0, bits=bits, flat=0.0):
            errors.append(float((answer(model, images()) - plain).abs().max()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-2


def test_nothing_leaves_where_everything_is_kept() -> None:
    model = build("vit")
    plain = answer(model, images())
    with wrap(model, "spatten", keep=1.0):
        assert torch.equal(answer(model, images()), plain)


def test_heads_that_are_out_stay_out_and_give_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 6, 8, generator=generator)
    first = Pruned(0.5).attend(Attending(0, 1, q, k, v, v))
    alive = first.rows["alive"]
    assert alive.tolist() == [[True, True, False, False]] * 2  # none gave anything before
    assert not first.out[~alive].any()
    total = torch.tensor([[1.0, 2.0, 9.0, 9.0]] * 2)
    second = Pruned(0.25).attend(Attending(1, 1, q, k, v, v, rows={"alive": alive, "given": total}))
    assert second.rows["alive"].tolist() == [[False, True, False, False]] * 2
    assert second.share == 0.25


def test_images_are_by_themselves_and_nan_does_no_harm() -> None:
    model, x = build("vit"), images(3)
    options: dict[str, Any] = {"heads": 0.5, "values": 0.5, "bits": (6, 4)}
    with wrap(model, "spatten", keep=0.3, **options):
        together = answer(model, x)
        torch.testing.assert_close(answer(model, x[1:2]), together[1:2], rtol=1e-4, atol=1e-5)
        x[0, 0, 0, 0] = torch.nan
        torch.testing.assert_close(answer(model, x)[1:], together[1:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"heads": 0.5, "values": 0.5, "bits": (6, 4)}])
@pytest.mark.slow
def test_it_compiles_to_one_graph(options: dict[str, Any]) -> None:
    model = build("vit")
    with wrap(model, "spatten", keep=0.4, **options):
        assert_one_graph(model, images())


def test_heads_are_of_vits_alone() -> None:
    model, _ = tiny.build("llava")
    with pytest.raises(UnsupportedError, match="spatten needs Attention"):
        vtprune.wrap(model, "spatten", keep=0.5, heads=0.5)
    vtprune.wrap(model, "spatten", keep=0.5).remove()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0}, "heads=0 is no share"),
        ({"values": 1.1}, "values=1.1 is no share"),
        ({"flat": -1.0}, "flat=-1.0 is no share"),
        ({"bits": 8}, "bits=8: give"),
        ({"bits": (1, 4)}, "bits=\\(1, 4\\): give"),
        ({"bits": (12, 8)}, "bits=\\(12, 8\\): give"),
    ],
)
def test_odd_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpAtten(**options)
