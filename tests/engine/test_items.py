"""Parts of images put together again, newlines beside them, budgets shared among tiles."""

from __future__ import annotations

import pytest
import torch

from vtprune.engine.items import Item, join, stand
from vtprune.types import Budget, Mix, Selection
from vtprune.vlm_adapters._base import Modality

IMAGE = Modality("image", ("pixel_values",), 9, "image")


def rows(*index: int, n: int) -> Selection:
    return Selection(torch.tensor([index], dtype=torch.long), n)


def test_parts_are_joined_in_the_order_of_the_item():
    first, second = torch.tensor([0, 1, 4, 5]), torch.tensor([2, 3, 6, 7])
    joined, order = join([(rows(1, 2, n=4), first), (rows(0, 3, n=4), second)], 8)
    assert joined.rows.tolist() == [[1, 2, 4, 7]]
    assert order.tolist() == [0, 2, 1, 3]
    assert joined.mix is None


def test_one_part_that_is_everything_keeps_its_own_order():
    whole = rows(3, 0, n=4)
    joined, order = join([(whole, torch.arange(4))], 4)
    assert joined is whole
    assert order.tolist() == [0, 1]


def test_mixes_of_parts_read_their_own_tokens_and_prefixes():
    mix = Mix(  # a new row of the prefix, then token 1 plus half of token 0
        torch.tensor([[2, 1, 0]]), torch.tensor([[0, 1, 1]]), torch.tensor([[1.0, 1.0, 0.5]])
    )
    part = Selection(torch.tensor([[-1, 1]]), 2, mix)
    joined, order = join([(part, torch.tensor([0, 2])), (part, torch.tensor([1, 3]))], 4)
    x = torch.tensor([[[1.0], [2.0], [4.0], [8.0], [100.0], [200.0]]])  # two prefixes at the end
    apart = torch.cat([part.apply(x[:, [0, 2, 4]])[0], part.apply(x[:, [1, 3, 5]])[0]])
    assert joined.rows.tolist() == [[0, 1, 2, 3]]
    assert torch.equal(joined.apply(x)[0], apart[order])
    assert apart[order][:, 0].tolist() == [100.0, 200.0, 4.5, 9.0]


@pytest.mark.parametrize("first", [rows(0, 1, n=2), rows(0, n=2)])
def test_a_part_that_mixes_nothing_has_its_prefix_all_the_same(first):
    mix = Mix(torch.tensor([[2]]), torch.tensor([[0]]), torch.ones(1, 1))
    second = Selection(torch.tensor([[-1]]), 2, mix)
    joined, _ = join([(first, torch.tensor([0, 1])), (second, torch.tensor([2, 3]))], 4, 1)
    x = torch.tensor([[[1.0], [2.0], [4.0], [8.0], [100.0], [200.0]]])
    own = x[0, first.rows[0], 0].tolist()
    assert joined.apply(x)[0, :, 0].tolist() == [*own, 200.0]


def test_a_mix_that_leaves_the_last_token_out():
    mix = Mix(torch.tensor([[0]]), torch.tensor([[0]]), torch.ones(1, 1))
    part = Selection(torch.tensor([[-1]]), 3, mix)
    joined, _ = join([(part, torch.tensor([0, 1, 2])), (rows(0, n=1), torch.tensor([3]))], 4)
    x = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]])
    assert joined.apply(x)[0, :, 0].tolist() == [1.0, 8.0]


def test_a_part_of_which_nothing_stays():
    mix = Mix(torch.tensor([[0, 1]]), torch.tensor([[0, 0]]), torch.full((1, 2), 0.5))
    part, none = Selection(torch.tensor([[-1]]), 2, mix), rows(n=0)
    joined, _ = join([(part, torch.tensor([0, 1])), (none, torch.arange(0))], 3)
    assert joined.apply(torch.tensor([[[1.0], [3.0], [9.0]]])).tolist() == [[[2.0]]]


def lined() -> Item:
    """A base view of two tokens, then two rows of two with a newline each."""
    free = torch.tensor([0, 1, 2, 3, 5, 6])
    return Item(IMAGE, torch.arange(8.0)[:, None], None, free, torch.tensor([4, 7]))


@pytest.mark.parametrize(
    ("policy", "kept", "wanted"),
    [
        ("keep", (0, 4), [0, 4, 5, 7]),
        ("row", (0, 4), [0, 5, 7]),
        ("row", (2, 3), [2, 3, 4]),
        ("row", (0, 1), [0, 1]),  # the base view is no row
        ("row", (3, 5), [3, 4, 6, 7]),
    ],
)
def test_newlines_stand_or_leave_with_their_row(policy, kept, wanted):
    item = lined()
    chosen = rows(*kept, n=6)
    selection, tokens = stand(item, chosen, item.tokens[item.free[list(kept)]], policy)
    assert selection.rows.tolist() == [wanted]
    assert tokens[:, 0].tolist() == wanted
    assert item.describe(selection) == ("image", len(set(wanted) & {4, 7}), None)


def test_a_budget_of_tokens_is_shared_among_tiles():
    def counts(tokens: int, *lengths: int) -> list[int | None]:
        return [budget.tokens for budget in Budget(tokens=tokens).split(lengths)]

    assert counts(10, 16, 16, 16, 16, 16) == [2, 2, 2, 2, 2]
    assert counts(7, 16, 16, 8) == [3, 3, 1]
    assert counts(2, 5, 5, 5) == [1, 1, 1]  # at least one each
    assert counts(99, 4, 2) == [4, 2]
    assert sum(n or 0 for n in counts(64, 36, 30, 7, 1)) == 64
    assert Budget(fraction=0.3).split([4, 9]) == [Budget(tokens=1), Budget(tokens=3)]
    assert [b.tokens for b in Budget(fraction=0.25).split([36] * 5)] == [9] * 5
