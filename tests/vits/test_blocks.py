"""What blocks of a ViT can do besides: ragged batches, new tokens, maps, guests, maps ahead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import vtprune
from tests.vits.models import DEPTH, PATCHES, answer, assert_one_graph, build, images
from vtprune.engine.vit_attention import merged
from vtprune.strategies.random import Random
from vtprune.strategies.tome import ToMe
from vtprune.types import (
    ClsRow,
    Keys,
    Maps,
    Mix,
    Need,
    Received,
    Selection,
    Signals,
    Site,
    Stage,
    Strategy,
)

NAMES = ["vit", "eva02_fused", "rope_mixed", "siglip_map", "siglip_gap", "open_clip"]


@dataclass(frozen=True)
class Ragged(ToMe):
    """Merges every image to a count that its own states decide."""

    kind = "adaptive"

    def counts(self, signals: Signals, budget: Any) -> list[int]:
        part = signals.tokens.double().abs().sum((1, 2))
        return [signals.n - 4 - int(1000 * x) % 7 for x in part]


@dataclass(frozen=True)
class RaggedRandom(Ragged):
    """The same, where patches leave."""

    def select(self, signals: Signals, k: int) -> Selection:
        return Random().select(signals, k)


def test_what_fills_rows_up_is_seen_where_it_is_not_hidden(monkeypatch: Any) -> None:
    model, x = build("vit"), images(4)
    monkeypatch.setattr("vtprune.engine.vit_attention.added", lambda state, q: None)
    with vtprune.wrap(model, RaggedRandom(), keep=0.5):
        together = answer(model, x)
        alone = torch.cat([answer(model, x[i : i + 1]) for i in range(4)])
    assert not torch.allclose(together, alone, rtol=1e-3, atol=1e-3)


@dataclass(frozen=True)
class RaggedByReceived(Ragged):
    """Counts by the attention that patches receive, a mean over all queries."""

    def plan(self, facts: Any) -> tuple[Stage, ...]:
        layers = range(DEPTH)
        return tuple(Stage(Site.ENCODER, (Keys(i), Received(i)), i) for i in layers)

    def counts(self, signals: Signals, budget: Any) -> list[int]:
        received = signals.stack(Received)[-1]
        return [signals.n - 4 - int(10000 * x) % 7 for x in received.amax(1)]


EACH = [Ragged(), Ragged(prop_attn=False), RaggedRandom(), RaggedByReceived()]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("strategy", EACH)
def test_an_image_of_a_ragged_batch_is_as_alone(name: str, strategy: Strategy) -> None:
    model, x = build(name), images(4)
    handle: Any = vtprune.wrap(model, strategy, keep=0.5)
    with handle:
        together, kept = answer(model, x), [i.kept for i in handle.report().images]
        chosen = handle.selections
        assert len(set(kept)) > 1
        for row in range(4):
            torch.testing.assert_close(answer(model, x[row : row + 1]), together[row : row + 1])
            assert [i.kept for i in handle.report().images] == [kept[row]]
            assert torch.equal(handle.selections[0].rows, chosen[row].rows)
            assert chosen[row].rows.shape == (1, kept[row])


@dataclass(frozen=True)
class Fusing(Strategy):
    """Keeps the first tokens, and adds up all others times 0.1 to a new one behind them."""

    counts_as: float = 1.0

    def plan(self, facts: Any) -> tuple[Stage, ...]:
        return tuple(Stage(Site.ENCODER, (), i, before_mlp=True) for i in (0, 1))

    def counts(self, signals: Signals, budget: Any) -> list[int]:
        return [signals.n // 2] * len(signals.tokens)

    def select(self, signals: Signals, k: int) -> Selection:
        batch, n = signals.tokens.shape[:2]
        source = torch.arange(n).expand(batch, n)
        weight = torch.where(source < k - 1, 1.0, 0.1)
        rows = torch.where(torch.arange(k) < k - 1, torch.arange(k), -1).expand(batch, k)
        sizes = torch.full((batch, k), self.counts_as)
        return Selection(rows, n, Mix(source, source.clamp(max=k - 1), weight), sizes)


@pytest.mark.parametrize("name", ["vit", "eva02_fused", "siglip_gap"])
def test_new_tokens_take_a_free_place(name: str) -> None:
    model, x = build(name), images()
    seen: list[Tensor] = []
    handle: Any = vtprune.wrap(model, Fusing(), keep=0.25)
    with handle:
        hook = handle.adapter.blocks[0].register_forward_hook(lambda m, a, out: seen.append(out))
        answer(model, x)
        hook.remove()
        state = handle._passage.entering[1]
        assert handle.selections[0].rows.tolist() == [list(range(16))]
        assert torch.equal(state.index[0], torch.arange(32))
        assert state.owner[0].tolist() == [*range(31), *[31] * 33]
        assert bool((state.sizes == 1).all())
        assert seen[0].shape[1] == 32 + handle.adapter.n_prefix


def test_sizes_of_a_selection_are_those_that_count() -> None:
    model, x = build("siglip_gap"), images()
    answers = []
    for counts_as in (1.0, 3.0):
        handle: Any = vtprune.wrap(model, Fusing(counts_as), keep=0.25)
        with handle:
            answers.append(answer(model, x))
            assert bool((handle._passage.entering[-1].sizes == counts_as).all())
    torch.testing.assert_close(*answers)  # of equal sizes the mean is the plain one


@dataclass(frozen=True)
class Looking(ToMe):
    """Takes down what it is shown."""

    seen: tuple[list[Any], ...] = ([],)

    def plan(self, facts: Any) -> tuple[Stage, ...]:
        needs = [(Keys(i), Maps(i), ClsRow(i), Received(i)) for i in range(DEPTH)]
        return tuple(Stage(Site.ENCODER, needs[i], i, proportional=True) for i in range(DEPTH))

    def select(self, signals: Signals, k: int) -> Selection:
        self.seen[0].append(signals)
        return super().select(signals, k)


def test_maps_are_of_all_tokens_and_agree_with_what_is_read_of_them() -> None:
    model = build("vit")
    looking = Looking(seen=([],))
    with vtprune.wrap(model, looking, reduce=9):
        answer(model, images())
    assert len(looking.seen[0]) == DEPTH
    for layer, signals in enumerate(looking.seen[0]):
        maps, n = signals.values[Maps(layer)], PATCHES - 9 * layer
        assert set(signals.values) == {Keys(layer), Maps(layer), ClsRow(layer), Received(layer)}
        assert maps.shape == (2, 3, n + 1, n + 1) and maps.dtype == torch.float32
        row, received = maps[:, :, 0, 1:].mean(1), maps.mean((1, 2))[:, 1:]
        torch.testing.assert_close(row, signals.values[ClsRow(layer)])
        torch.testing.assert_close(received, signals.values[Received(layer)])


@dataclass(frozen=True)
class Ahead(ToMe):
    """ToMe at the start of a block, whose attention map it merges."""

    def plan(self, facts: Any) -> tuple[Stage, ...]:
        needs: list[tuple[Need, ...]] = [(Keys(i),) for i in range(DEPTH)]
        return tuple(
            Stage(Site.ENCODER, needs[i], i, ahead=True, proportional=True) for i in range(DEPTH)
        )


def test_a_merged_map_adds_columns_up_and_mixes_rows() -> None:
    torch.manual_seed(0)
    weights = torch.randn(2, 3, 9, 9, dtype=torch.float64).softmax(-1)
    rows, into = torch.tensor([[0, 2, 5]] * 2), torch.tensor([[0, 0, 1, 1, 1, 2, 2, 0]] * 2)
    share = torch.rand(2, 8)
    chosen = Selection(rows, 8, Mix(torch.arange(8).expand(2, 8), into, share))
    edges = torch.zeros(2, 3, 8).scatter(1, into[:, None], torch.ones(2, 1, 8))
    mixing = edges * share[:, None]
    prefix = torch.ones(2, 1, 1)
    whole, part = (
        torch.stack([torch.block_diag(a, b) for a, b in zip(prefix, x, strict=True)]).double()
        for x in (edges, mixing)
    )
    expected = torch.einsum("bhqk,bjq,bik->bhji", weights, part, whole)
    expected = expected / expected.sum(-1, keepdim=True)
    torch.testing.assert_close(merged(weights, chosen, 1), expected)


@pytest.mark.parametrize("name", ["vit", "eva02_fused", "siglip_gap", "open_clip"])
def test_a_map_of_equal_tokens_is_merged_as_it_would_be_computed(name: str) -> None:
    """Copies of one token attend alike: their merged map is that of the tokens that are left."""
    model = build(name)
    handle: Any = vtprune.wrap(model, Ahead(), reduce=[32])
    with handle, torch.no_grad():
        adapter, width = handle.adapter, model.blocks[0] if hasattr(model, "blocks") else None
        block, p = adapter.blocks[0], adapter.n_prefix
        size = (width or block).mlp[0].in_features if name == "open_clip" else 48
        some = torch.randn(2, p + 32, size)
        patches = some[:, p:].repeat_interleave(2, dim=1)
        kwargs = {}
        if name == "eva02_fused":  # of copies, the same angle
            rope = model.rope.get_embed((8, 8))
            kwargs = {"rope": rope[::2].repeat_interleave(2, dim=0)}
        out = block(torch.cat([some[:, :p], patches], dim=1), **kwargs)
    whole = block(torch.cat([some[:, :p], patches], dim=1), **kwargs)
    expected = torch.cat([whole[:, :p], whole[:, p::2]], dim=1)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_ahead_reduces_nothing_bit_for_bit_and_counts() -> None:
    model, x = build("vit"), images()
    plain = answer(model, x)
    handle: Any = vtprune.wrap(model, Ahead(), reduce=0)
    with handle:
        assert torch.equal(answer(model, x), plain)
    with vtprune.wrap(model, Ahead(), keep=16) as handle:
        assert answer(model, x).isfinite().all()
        report = handle.report()
        assert report.images[0].kept == 16 and report.tiles[0].passed[-1] == 17


@dataclass(frozen=True)
class Guest(ToMe):
    """ToMe beside a second [CLS]."""

    added: float = 0.0

    def guests(self, facts: Any) -> Tensor:
        return self.added * torch.randn(DEPTH, 48, generator=torch.Generator().manual_seed(0))


def test_a_guest_is_no_part_of_what_reduces_nothing() -> None:
    model, x = build("vit"), images()
    plain = answer(model, x)
    amounts: list[dict[str, Any]] = [{"reduce": 0}, {"keep": 1.0}]
    for amount in amounts:
        with vtprune.wrap(model, Guest(added=1.0), **amount):
            assert torch.equal(answer(model, x), plain)


@pytest.mark.parametrize("name", ["vit", "eva02_fused", "rope_mixed", "distilled"])
def test_a_guest_is_a_token_of_the_prefix(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of [CLS] in the model itself, between prefix and patches, gives the same."""
    model, x = build(name), images()
    blocks: list[Tensor] = []
    monkeypatch.setattr("vtprune.engine.vit_plan.Plan.idle", lambda *args: False)
    handle: Any = vtprune.wrap(model, Guest(), reduce=0)
    p = handle.adapter.n_prefix
    with handle, torch.no_grad():
        hook = handle.adapter.blocks[-1].register_forward_hook(lambda m, a, o: blocks.append(o))
        seen = answer(model, x)
        hook.remove()
        assert handle._passage.counted == [(PATCHES + p + 1,) * 2] * DEPTH
    assert blocks[0].shape[1] == PATCHES + p and not torch.allclose(seen, answer(model, x))
    if name in ("eva02_fused", "rope_mixed"):  # with a turn, which only patches have
        for block in model.blocks:
            block.attn.num_prefix_tokens = p + 1
    hooks = [
        model.blocks[0].register_forward_pre_hook(
            lambda m, a: (torch.cat([a[0][:, :p], a[0][:, :1], a[0][:, p:]], 1), *a[1:])
        ),
        model.blocks[-1].register_forward_hook(
            lambda m, a, o: torch.cat([o[:, :p], o[:, p + 1 :]], 1)
        ),
    ]
    torch.testing.assert_close(answer(model, x), seen, rtol=1e-5, atol=1e-5)
    for one in hooks:
        one.remove()


def test_what_guests_learned_is_added_before_every_block() -> None:
    model, x = build("vit"), images()
    answers, states = [], []
    for added in (0.0, 1.0):
        handle: Any = vtprune.wrap(model, Guest(added=added), reduce=4)
        with handle:
            answers.append(answer(model, x))
            states.append(handle._passage.entering[-1].guests)
            assert handle.report().images[0].kept == PATCHES - 4 * DEPTH
    assert not torch.allclose(*answers) and states[0].shape == (2, 1, 48)


def test_guests_of_another_width_are_refused() -> None:
    @dataclass(frozen=True)
    class Wide(Guest):
        def guests(self, facts: Any) -> Tensor:
            return torch.zeros(DEPTH, 47)

    with pytest.raises(vtprune.ConfigError, match=f"{DEPTH} blocks of width 48"):
        vtprune.wrap(build("vit"), Wide(), reduce=4)


def test_guests_stay_where_blocks_give_all_patches() -> None:
    model, x = build("vit"), images()
    with vtprune.wrap(model, Guest(added=0.5), reduce=4), torch.no_grad():
        features = model.forward_features(x)
        whole, _ = model.forward_intermediates(x, norm=True)
        torch.testing.assert_close(whole[:, 0], features[:, 0], rtol=1e-5, atol=1e-5)


def test_a_share_of_operations_is_met_by_the_counts_of_the_strategy() -> None:
    for saved in (0.2, 0.5):
        handle: Any = vtprune.wrap(build("vit"), Ahead(), reduce=saved)
        with handle:
            answer(handle.model, images())
            assert saved <= 1 - handle.report().tower().share
            kept = handle.report().images[0].kept
        more: Any = vtprune.wrap(handle.model, Ahead(), keep=kept + 1)
        with more:
            answer(more.model, images())
            assert 1 - more.report().tower().share < saved
    with pytest.raises(vtprune.ConfigError, match="counts by the image"):
        vtprune.wrap(build("vit"), Ragged(), reduce=0.3)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [Ahead(), Guest(added=0.5), Fusing()])
@pytest.mark.parametrize("name", ["vit", "eva02_fused"])
def test_all_of_it_compiles_to_one_graph(name: str, strategy: Strategy) -> None:
    model, x = build(name), images()
    with vtprune.wrap(model, strategy, keep=0.25):
        assert_one_graph(model, x)
