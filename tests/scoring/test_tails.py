"""What becomes of the end of a ranking, held against loops in float64."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from vtprune.scoring.tails import LEAST, merge_tail


@given(st.data())
def test_outputs_and_sizes_are_those_of_the_loops(data: st.DataObject) -> None:
    n = data.draw(st.integers(2, 24))
    k = data.draw(st.integers(1, n - 1))
    pruned = data.draw(st.integers(0, n - k))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    x = torch.randn(1, n, 8, generator=generator)
    size = torch.rand(1, n, generator=generator) + 0.5
    order = torch.randperm(n, generator=generator)[None]
    made = merge_tail(order, k, pruned, x, size)
    kept, tail = sorted(order[0, :k].tolist()), order[0, k : n - pruned].tolist()
    groups, sizes = {i: [i] for i in kept}, {i: size[0, i].double() for i in kept}
    for i in tail:
        cosine = cosine_similarity(x[0, i].double(), x[0, kept].double(), dim=-1)
        best = kept[int(cosine.argmax())]
        groups[best].append(i)
        sizes[best] = sizes[best] + size[0, i].double() * cosine.max()
    assert made.rows.tolist() == [kept]
    wanted = torch.stack([x[0, groups[i]].double().mean(0) for i in kept])
    torch.testing.assert_close(made.apply(x)[0].double(), wanted, rtol=1e-5, atol=1e-6)
    counted = torch.stack([sizes[i] for i in kept]).clamp(min=LEAST)
    torch.testing.assert_close(made.counted(size)[0].double(), counted, rtol=1e-5, atol=1e-6)


def test_opposites_count_for_something_and_broken_ones_for_nothing() -> None:
    nan = float("nan")
    x = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0], [nan, 0.0]]])
    order, size = torch.tensor([[0, 1, 2, 3]]), torch.ones(1, 4)
    assert round(merge_tail(order, 1, 2, x, size).counted(size).item(), 6) == LEAST
    made = merge_tail(order, 2, 0, x, size)
    assert made.rows.tolist() == [[0, 1]]
    assert bool(made.counted(size).isfinite().all())
    assert made.counted(size)[0, 0] <= 2
