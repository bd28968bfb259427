"""Under ``device_map="auto"`` the engine follows its tensors from device to device.

Real second devices are not at hand: these only claim to be some (``far.py``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import Tensor

import vtprune
from tests.families.batches import Batch, batch, new_ids
from tests.families.far import FIRST, SECOND, Far, place, put, several
from tests.projectors import ready
from vtprune.engine import layers
from vtprune.eval import tiny
from vtprune.strategies.todre import ToDRE
from vtprune.strategies.zipvl import ZipVL

SITES: dict[str, tuple[Any, Any]] = {
    "projector": ("fastervlm", 0.5),
    "tower": ("visionzip", 0.5),
    "tower merging": ("tome", 0.5),
    "decoder": ("fastv", 0.5),
    "stages": ("pyramiddrop", 0.8),
    "while layers run": ("transprune", 0.8),
    "merging inside": ("sparsevlm", 0.8),
    "head by head": ("sparsevlm_plus", 0.8),
    "merging at both": ("visiondrop", 0.5),
    "exit": (ToDRE(exit=True, tau=1.0), 0.5),
    "both": (["fastervlm", "fastv"], [0.7, 0.5]),
    "tower and decoder": ("flowcut", 0.4),
    "made in layers": (["fastv", "saisa"], 0.5),
    "dropped from a cache": (ZipVL(tau=0.6, every=2), None),
    "packed in a cache": (ZipVL(tau=0.6, others="pack", bits=(8, 4), every=2), None),
}
# Its experts are counted by an operation that the CPU has for other types only.
FAMILIES = [family for family in tiny.names() if family != "qwen3_vl_moe"]


def steps(model: Any, inputs: Batch, n: int = 3) -> tuple[Tensor, Tensor]:
    """Returns the ids ``[B, n]`` and the last logits of a greedy decode loop."""
    mask, ids, out = inputs["attention_mask"], [], model(**inputs, use_cache=True)
    for _ in range(n):
        ids.append(out.logits[:, -1].argmax(-1).to(mask.device))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        cache = out.past_key_values
        out = model(input_ids=ids[-1][:, None], past_key_values=cache, attention_mask=mask)
    return torch.stack(ids, dim=1), out.logits


def fitted(strategy: Any, model: Any) -> Any:
    """Returns the strategy with what it lacks for this model."""
    return [ready(one, model) for one in strategy] if isinstance(strategy, list) else strategy


def near(x: Tensor) -> Tensor:
    return x.held if isinstance(x, Far) else x


def halves(model: Any) -> None:
    """The second half of the decoder and the head on the second device, all else on the first."""
    put(model, FIRST)
    text = model.get_decoder()
    for part in (*text.layers[len(text.layers) // 2 :], text.norm, model.lm_head):
        place(part, SECOND)


def on_disk(model: Any) -> dict[str, Any]:
    """A device map: the tower and the second half of the decoder on disk, all else on the CPU."""
    text = model.get_decoder()
    away = [*text.layers[len(text.layers) // 2 :], *model.base_model.children()]
    away = [m for m in away if m is not text]
    places = {name: "disk" for name, m in model.named_modules() if any(m is x for x in away)}
    rest = {name.rpartition(".")[0] for name, _ in model.named_parameters()}
    return places | {
        name: "cpu" for name in rest if not any(f"{name}.".startswith(f"{p}.") for p in places)
    }


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    if request.param == "smolvlm":
        pytest.importorskip("num2words")
    return request.param


@pytest.fixture(scope="module")
def pair(family: str) -> tuple[Any, Any, Batch]:
    """The model on one device, on two, and the inputs."""
    (one, processor), (two, _) = tiny.build(family), tiny.build(family)
    halves(two)
    return one, two, batch(processor, "ragged")


@pytest.mark.parametrize("site", SITES)
def test_two_devices_give_what_one_gives(pair: Any, site: str) -> None:
    one, two, inputs = pair
    strategy, keep = SITES[site]
    strategy = fitted(strategy, one)
    with torch.no_grad(), vtprune.wrap(one, strategy, keep=keep):
        ids, logits = steps(one, inputs)
    with several(), vtprune.wrap(two, strategy, keep=keep) as handle:
        far_ids, far_logits = steps(two, {k: Far(v, FIRST) for k, v in inputs.items()})
        assert far_logits.device == SECOND
        assert handle.final is not None and handle.final.device == FIRST
    assert torch.equal(near(far_ids), ids)
    torch.testing.assert_close(near(far_logits), logits, atol=1e-4, rtol=1e-4)


def test_layers_that_do_not_follow_are_noticed(pair: Any, monkeypatch: Any) -> None:
    _, two, inputs = pair
    monkeypatch.setattr(layers, "_device", lambda layer, hidden: hidden.device)
    far: Batch = {k: Far(v, FIRST) for k, v in inputs.items()}
    mixes = pytest.raises(RuntimeError, match="mixes devices")
    with several(), vtprune.wrap(two, "pyramiddrop", keep=0.8), mixes:
        steps(two, far)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_weights_that_wait_on_disk(family: str, site: str, tmp_path: Path) -> None:
    model, processor = tiny.build(family)
    inputs = batch(processor, "ragged")
    strategy, keep = SITES[site]
    strategy = fitted(strategy, model)
    with vtprune.wrap(model, strategy, keep=keep):
        ids = new_ids(model, inputs)
    main: Any = "cpu"  # what accelerate compares with, though it asks for a torch.device
    split: Any = accelerate.dispatch_model(model, on_disk(model), main, offload_dir=tmp_path)
    assert {str(p.device) for p in split.parameters()} == {"cpu", "meta"}
    with vtprune.wrap(split, strategy, keep=keep):
        assert torch.equal(new_ids(split, inputs), ids)


# transformers itself makes some tensors on the default device there.
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("gemma3", "qwen2_5_vl")])
def test_nothing_is_made_on_the_default_device(family: str) -> None:
    model, processor = tiny.build(family)
    inputs = batch(processor, "ragged")
    with torch.no_grad(), torch.device("meta"):
        model(**inputs)
        for strategy, keep in (*SITES.values(), ("random", 0.5), ("strided", 0.5)):
            with vtprune.wrap(model, fitted(strategy, model), keep=keep):
                steps(model, inputs)
                model.generate(**inputs, max_new_tokens=2)
