"""DAMRO: what it ranks by, and that of tiled images it takes the base view."""

from __future__ import annotations

import pytest
import torch

import vtprune
from tests.families.oracles import inputs_of, model_of
from tests.probes import Spy
from vtprune import ConfigError
from vtprune.types import ClsRow, Received, Signals, Tile, WideClsRow


def test_ranks_by_attention_of_cls() -> None:
    rows = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    signals = Signals(torch.zeros(1, 4, 2), values={ClsRow(2): rows})
    assert vtprune.select("damro", keep=2, signals=signals).rows.tolist() == [[1, 3]]
    wide = Signals(torch.zeros(1, 4, 2), values={WideClsRow(2): rows.flip(1)})
    made = vtprune.select("damro", keep=3, signals=wide, compat=True)
    assert made.rows.tolist() == [[2, 0, 1]], "by falling attention"


def test_takes_the_base_view_first() -> None:
    values = {
        Received(2): torch.tensor([[0.1, 0.4, 0.9, 0.8]]),
        Tile(2): torch.tensor([[0, 0, 1, 2]]),
    }
    signals = Signals(torch.zeros(1, 4, 2), values=values)
    assert vtprune.select("damro", keep=1, signals=signals).rows.tolist() == [[1]]
    assert vtprune.select("damro", keep=3, signals=signals).rows.tolist() == [[0, 1, 2]]
    values[Tile(2)] = torch.ones(1, 4)
    with pytest.raises(ConfigError, match="base=False"):
        vtprune.select("damro", keep=1, signals=signals)


def test_tokens_of_tiles_leave() -> None:
    """Of LLaVA-NeXT, whose base view is the first tokens of an image."""
    model, _ = model_of("llava_next")
    inputs = inputs_of("llava_next", "ragged")
    spy = Spy(wanted=(Tile(0),))
    with vtprune.wrap(model, spy, keep=1) as handle:
        handle.encode(inputs)
    sizes = [int((signals.values[Tile(0)] == 0).sum(1)[0]) for signals in spy.seen]
    base = sizes[0]
    assert set(sizes) == {base} and all(signals.n > base for signals in spy.seen)
    for signals in spy.seen:
        assert (signals.values[Tile(0)][:, :base] == 0).all()
        assert (signals.values[Tile(0)][:, base:] > 0).all()
    with vtprune.wrap(model, "damro", keep=3) as handle:
        handle.encode(inputs)
        for selection in handle.selections:
            assert selection.rows.shape[1] == 3, "no newline of a row that left"
            assert int(selection.rows.max()) < base
    with vtprune.wrap(model, "damro", keep=8, base=False, scope="tile") as handle:
        handle.encode(inputs)
        assert all(int(selection.rows.max()) >= base for selection in handle.selections)
    with (
        vtprune.wrap(model, "damro", keep=8, scope="tile") as handle,
        pytest.raises(ConfigError, match="base=False"),
    ):
        handle.encode(inputs)


def test_heads_are_joined_officially() -> None:
    model, inputs = model_of("llava")[0], inputs_of("llava", "ragged")
    states: list[torch.Tensor] = []
    tower = model.model.vision_tower
    block = tower.encoder.layers[model.config.vision_feature_layer]

    def keep(module: torch.nn.Module, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        hidden = kwargs.get("hidden_states")
        states.append(args[0] if hidden is None else hidden)  # type: ignore[index]

    hook = block.self_attn.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad(), hook:
        tower(inputs["pixel_values"])
        q, k = block.self_attn.q_proj(states[0]), block.self_attn.k_proj(states[0])
    attention = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)[:, 0, 1:]
    wanted = attention.argsort(dim=1, descending=True, stable=True)[:, :4]
    with vtprune.wrap(model, "damro", keep=4, compat=True) as handle:
        handle.encode(inputs)
        made = torch.cat([selection.rows for selection in handle.selections])
    assert torch.equal(made, wanted)
