"""Strategies that act between attention and MLP, on whole ViTs: what each block is made to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from tests.vits.models import DEPTH, PATCHES, answer, assert_one_graph, build, images, wrap

OWN = {"rates": ((60, 40, 20), (60, 30, 15)), "tokens": 65}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "pitome": ("pitome", {}),
    "pitome by states": ("pitome", {"metric": "states", "prop_attn": True}),
    "tofu": ("tofu", {}),
    "diffrate": ("diffrate", {}),
    "diffrate by own lists": ("diffrate", OWN),
    "evit": ("evit", {}),
    "evit without fusing": ("evit", {"fuse": False}),
}
MODELS = ("vit", "registers", "siglip_map", "siglip_gap", "rope_mixed", "open_clip")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", MODELS)
def test_budgets_are_met_and_images_are_alone(name: str, variant: str) -> None:
    strategy, options = VARIANTS[variant]
    model, x = build(name), images(3)
    plain = answer(model, x)
    for keep in (1, 20, 63):
        with wrap(model, strategy, keep=keep, **options) as handle:
            together = answer(model, x)
            assert [image.kept for image in handle.report().images] == [keep] * 3
            assert all((s.rows.diff() > 0).all() for s in handle.selections)
            assert together.isfinite().all()
            torch.testing.assert_close(answer(model, x[1:2]), together[1:2], rtol=1e-4, atol=1e-5)
    with wrap(model, strategy, keep=PATCHES, **options):
        assert torch.equal(answer(model, x), plain)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_share_of_operations_is_saved(variant: str) -> None:
    strategy, options = VARIANTS[variant]
    with wrap(build("vit"), strategy, reduce=0.2, **options) as handle:
        answer(handle.model, images())
        assert 0.2 <= 1 - handle.report().tower().share < 0.23


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.slow
def test_static_counts_compile_to_one_graph(variant: str) -> None:
    strategy, options = VARIANTS[variant]
    model, x = build("vit"), images()
    with wrap(model, strategy, keep=20, **options):
        assert_one_graph(model, x)


@torch.no_grad()
def first_half(block: Any, x: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """States after attention, its map and its keys, of a block of timm's ViT; in float64."""
    attention = block.attn
    batch, n, width = x.shape
    qkv = attention.qkv(block.norm1(x)).view(batch, n, 3, attention.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    logits = q @ k.mT * attention.head_dim**-0.5
    weights = (logits if bias is None else logits + bias[:, None, None]).softmax(-1)
    made = (weights @ v).transpose(1, 2).reshape(batch, n, width)
    return x + attention.proj(made), weights, k.mean(1)


@torch.no_grad()
def dense(model: Any, x: Tensor, step: Any, counts: list[int]) -> Tensor:
    """Logits where ``step`` takes the states, the map, the keys and sizes of each block to fewer.

    One image; sizes are of all tokens, the first of them [CLS].
    """
    model = model.double()
    x = model._pos_embed(model.patch_embed(x.double()))
    sizes = x.new_ones(x.shape[1])
    for i, (block, k) in enumerate(zip(model.blocks, counts, strict=True)):
        x, weights, keys = first_half(block, x, sizes.log()[None])
        if k < x.shape[1] - 1:
            states, sizes = step(i, x[0], weights[0], keys[0], sizes, k)
            x = states[None]
        x = x + block.mlp(block.norm2(x))
    return model.head(model.norm(x)[:, 0])


def fuse(i: int, x: Tensor, weights: Tensor, keys: Tensor, sizes: Tensor, k: int) -> Any:
    score = weights[:, 0, 1:].mean(0)
    order = score.argsort(descending=True)
    kept, others = order[: k - 1].sort().values, order[k - 1 :]
    fused = (x[1 + others] * score[others, None]).sum(0, keepdim=True)
    return torch.cat([x[:1], x[1 + kept], fused]), sizes[: k + 1]


def sorted_out(i: int, x: Tensor, weights: Tensor, keys: Tensor, sizes: Tensor, k: int) -> Any:
    """Half of what leaves is merged, and the last half pruned."""
    order = 1 + weights[:, 0, 1:].mean(0).argsort(descending=True)
    pruned = round((len(x) - 1 - k) / 2)
    kept, tail = order[:k], order[k : len(x) - 1 - pruned]
    cosine = cosine_similarity(x[tail, None], x[kept], dim=-1)
    groups: list[list[int]] = [[int(j)] for j in kept]
    grown = sizes.clone()
    for row, j in zip(cosine, tail.tolist(), strict=True):
        best = int(row.argmax())
        groups[best].append(j)
        grown[groups[best][0]] += sizes[j] * row[best]
    states = torch.stack([x[0], *(x[group].mean(0) for group in groups)])
    return states, torch.cat([sizes[:1], grown[kept]])


def by_energy(i: int, x: Tensor, weights: Tensor, keys: Tensor, sizes: Tensor, k: int) -> Any:
    """The way of later blocks, with the margin of block ``i``."""
    unit, r = normalize(keys[1:], dim=-1), len(x) - 1 - k
    similar = unit @ unit.T
    above = similar - 0.75 * (1 - i / DEPTH)
    energy = torch.where(above > 0, above, above.exp() - 1).mean(1)
    order = energy.argsort(descending=True)[: 2 * r]
    left, groups = order[1::2].tolist(), {j: [j] for j in range(len(unit))}
    for a in order[::2].tolist():
        groups[max(left, key=lambda j, a=a: float(similar[a, j]))] += groups.pop(a)
    made = [x[0]]
    for group in groups.values():
        places = torch.tensor(group) + 1
        made.append((x[places] * sizes[places, None]).sum(0) / sizes[places].sum())
    grown = torch.tensor([1, *(len(group) for group in groups.values())]).double()
    return torch.stack(made), grown


@pytest.mark.parametrize(
    ("strategy", "options", "step", "counts"),
    [
        ("evit", {"layers": (0, 1, 2)}, fuse, None),
        ("diffrate", {"rates": ((50, 30, 20), (35, 25, 15)), "tokens": 65}, sorted_out, None),
        ("pitome", {"bsm": 0.0, "prop_attn": True, "layers": (1,)}, by_energy, [64, 40, 40]),
    ],
)
def test_logits_are_those_of_a_dense_forward_pass(
    strategy: str, options: dict[str, Any], step: Any, counts: list[int] | None
) -> None:
    model, x = build("vit"), images(1)
    with wrap(model, strategy, keep=40 if counts else 14, **options) as handle:
        ours = answer(model, x)
        passed = [n - 1 for n in handle.report().tiles[0].passed]
    assert counts in (None, passed)
    wanted = dense(model, x, step, passed)
    torch.testing.assert_close(ours.double(), wanted, rtol=1e-4, atol=1e-5)
