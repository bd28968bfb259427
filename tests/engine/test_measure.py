"""What a report says of costs, against what the layers and the cache really held."""

from __future__ import annotations

from collections import defaultdict
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch

import vtprune
from tests import tiny
from tests.contracts.bank import NEEDS_FRAMES, OF_VITS
from tests.families import batches
from tests.families.oracles import inputs_of
from tests.gates import random_gates
from tests.projectors import ready
from vtprune import UnsupportedError
from vtprune.engine.timing import Clock, part, timing
from vtprune.eval import tiny as families
from vtprune.flops import Cost, Shape
from vtprune.registry import strategy_class, strategy_names
from vtprune.types import Site

KEEP = {
    "divprune": 9,
    "visionzip": 9,
    "flowcut": 9,
    "tome": 20,
    "fastv": 9,
    "pyramiddrop": 0.5,
}
ITEM = 4  # bytes of float32


@contextmanager
def seen(modules, lengths):
    """Notes the sequence lengths that the modules are called with, under their numbers."""
    with ExitStack() as stack:
        for number, module in enumerate(modules):

            def note(module, args, kwargs, number=number):
                hidden = args[0] if args else kwargs["hidden_states"]
                lengths[number].append(hidden.shape[1])

            hook = module.register_forward_pre_hook(note, with_kwargs=True)
            stack.callback(hook.remove)
        yield


def bytes_of(cache):
    return sum(ITEM * (layer.keys.numel() + layer.values.numel()) for layer in cache.layers)


@pytest.mark.parametrize("name", [n for n in strategy_names() if n not in OF_VITS | NEEDS_FRAMES])
def test_tokens_of_a_layer_are_those_it_is_called_with(name, tmp_path):
    model, inputs = tiny.build(), tiny.one_image()
    layers = model.model.language_model.layers
    blocks = model.model.vision_tower.encoder.layers
    decoder, attention, mlp = (defaultdict(list) for _ in range(3))
    parts = [
        seen(layers, decoder),
        seen([block.self_attn for block in blocks], attention),
        seen([block.mlp for block in blocks], mlp),
    ]
    keep = None if strategy_class(name).kind == "compute" else KEEP.get(name, 0.6)
    options: dict[str, Any] = {"gates": str(random_gates(tmp_path))} if name == "dyvte" else {}
    strategy = ready(name, model, **options)
    wrapped = vtprune.wrap(model, strategy, keep=keep, processor=tiny.Processor())
    with wrapped as handle, ExitStack() as stack:
        for observed in parts:
            stack.enter_context(observed)
        model(**inputs)
        report = handle.report()
    words = inputs["input_ids"].shape[1] - tiny.N
    assert report.text == (words,)
    assert [decoder[i] for i in range(4)] == [[words + n] for n in report.entering(0)]
    (tile,) = report.tiles
    assert tile.tokens == tiny.N + 1
    last = model.config.vision_config.num_hidden_layers - 2
    assert tile.attended == tuple(max(attention[i]) for i in range(last + 1))
    assert tile.passed == tuple(max(mlp[i]) for i in range(last + 1))
    shape, tower = Shape.of(model.config.text_config), Shape(32, 48, last + 1, gated=False)
    prefill = Cost(
        shape.prefill([words + n for n in report.entering(0)]), shape.prefill([words + tiny.N] * 4)
    )
    if report.rules is not None:
        prefill = Cost(prefill.macs * report.rules.realised, prefill.unpruned)
    assert report.prefill() == report.prefill(0) == prefill
    assert report.tower().macs == tower.prefill(tile.attended, tile.passed)
    assert report.tower().unpruned == tower.prefill([tiny.N + 1] * (last + 1))
    stages = [step.stage for step in handle.steps if step.stage.site is Site.ENCODER]
    early = [s for s in stages if s.inside_block or (s.layer is not None and s.layer < last)]
    assert (report.tower().share < 1) == bool(early)
    assert f"{100 * prefill.share:.1f} %" in str(report)


def test_rows_and_text_are_counted_alone():
    model, inputs = tiny.build(), tiny.ragged()
    with vtprune.wrap(model, "fastv", keep=9) as handle:
        model(**inputs)
        report = handle.report()
    lengths = inputs["attention_mask"].sum(1).tolist()
    words = [n - images * tiny.N for n, images in zip(lengths, (1, 2), strict=True)]
    assert list(report.text) == words
    shape = Shape.of(model.config.text_config)
    for row, (length, images) in enumerate(zip(lengths, (1, 2), strict=True)):
        visual = images * tiny.N
        stage = next(stage for stage in report.stages if stage.sample == row)
        entering = [visual] * stage.layer + [stage.kept] * (4 - stage.layer)
        assert stage.kept < visual
        assert report.entering(row) == tuple(entering)
        text = words[row]
        assert report.prefill(row).unpruned == shape.prefill([length] * 4)
        assert report.prefill(row).macs == shape.prefill([n + text for n in entering])
        assert report.prefill(row, text=False).macs == shape.prefill(entering)
        assert report.decode(7, row).macs == shape.decode([n + text for n in entering], 7)
    assert report.prefill() == report.prefill(0) + report.prefill(1)


@pytest.mark.parametrize("name", KEEP)
@pytest.mark.parametrize("copies", [1, 3])
def test_the_cache_is_as_large_as_it_says(name, copies):
    model, inputs = tiny.build(), tiny.one_image() if copies > 1 else tiny.ragged()
    options = {
        "max_new_tokens": 1,
        "do_sample": False,
        "num_beams": copies,
        "return_dict_in_generate": True,
    }
    whole = bytes_of(model.generate(**inputs, **options).past_key_values)
    with vtprune.wrap(model, name, keep=KEEP[name]) as handle:
        held = bytes_of(model.generate(**inputs, **options).past_key_values)
        report = handle.report()
    assert report.cache is not None
    assert (report.cache.held, report.cache.unpruned) == (held, whole)
    assert report.cache.allocated == held < whole
    assert "cache after the prefill" in str(report)


@pytest.mark.parametrize("name", ["divprune", "fastv"])
def test_a_cache_is_measured_after_the_prefill_alone(name):
    model, inputs = tiny.build(), tiny.one_image()
    ways = [{}, {"max_new_tokens": 9}, {"cache_implementation": "static", "max_new_tokens": 9}]
    if name == "divprune":
        ways += [{"prefill_chunk_size": 4}, {"prompt_lookup_num_tokens": 3, "max_new_tokens": 6}]
    with vtprune.wrap(model, name, keep=9) as handle:
        model(**inputs)
        wanted = handle.report().cache
        assert wanted is not None
        for options in ways:
            model.generate(**inputs, **{"max_new_tokens": 1, "do_sample": False, **options})
            found = handle.report().cache
            assert found is not None
            assert (found.held, found.unpruned) == (wanted.held, wanted.unpruned), options
            room = "cache_implementation" in options or "prompt_lookup_num_tokens" in options
            assert (found.allocated > found.held) == room, options
        model(**inputs, return_dict=False)
        assert handle.report().cache == wanted
        if name == "divprune":
            model(**inputs, use_cache=False)
            assert handle.report().cache is None
        text = tiny.batch(tiny.prompt(4, 6, 0, seed=1))
        del text["pixel_values"]
        model(**text)
        assert handle.report().cache is None
        assert handle.report().prefill() == Cost(0, 0)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_sliding_window_bounds_the_cache(cache):
    model, _ = families.build("gemma3")
    model.config.text_config.sliding_window = 16
    for layer in model.model.language_model.layers:
        if layer.self_attn.sliding_window is not None:
            layer.self_attn.sliding_window = 16
    inputs = inputs_of("gemma3", "one")
    options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True}
    options["cache_implementation"] = cache
    whole = model.generate(**inputs, **options).past_key_values
    lengths = [layer.keys.shape[2] for layer in whole.layers]
    assert min(lengths) in (15, 16) and max(lengths) > 16
    with vtprune.wrap(model, "divprune", keep=4) as handle:
        held = model.generate(**inputs, **options).past_key_values
        report = handle.report()
    assert report.cache is not None
    assert report.cache.allocated == bytes_of(held)
    if cache == "dynamic":
        assert (report.cache.held, report.cache.unpruned) == (bytes_of(held), bytes_of(whole))


@pytest.mark.parametrize("family", families.names())
def test_every_family_has_costs(family):
    if family == "smolvlm":
        pytest.importorskip("num2words")
    model, processor = families.build(family)
    kind = "one" if family == "smolvlm" else "ragged"
    inputs = batches.batch(processor, kind)
    with vtprune.wrap(model, "divprune", keep=0.5) as handle:
        model.generate(**inputs, max_new_tokens=1, do_sample=False)
        report = handle.report()
    n = inputs["attention_mask"].sum(1).tolist()
    assert [report.prefill(row).unpruned for row in range(len(n))] == [
        Shape.of(handle.adapter.language_model.config).prefill([k] * report.decoder_layers)
        for k in n
    ]
    assert report.prefill().share < 1
    assert report.tower().share == 1 and report.tower().macs > 0
    assert report.cache is not None and report.cache.held < report.cache.unpruned


def test_a_model_of_unknown_layers_has_a_report_without_costs():
    model, inputs = tiny.build(), tiny.one_image()
    with vtprune.wrap(model, "divprune", keep=9) as handle:
        model(**inputs)
        handle.adapter.language_model.config.__dict__["model_type"] = "unheard_of"
        report = handle.report()
    assert "prefill" not in str(report).replace("after the prefill", "")
    with pytest.raises(UnsupportedError, match="layers of 'unheard_of'"):
        report.prefill()


@pytest.mark.parametrize("name", KEEP)
def test_what_a_strategy_takes_is_timed_when_asked(name):
    model, inputs = tiny.build(), tiny.one_image()
    with vtprune.wrap(model, name, keep=KEEP[name]) as handle:
        model(**inputs)
        assert not handle.report().ms and not handle.report().parts
        handle.timing = True
        model(**inputs)
        report = handle.report()
    assert set(report.ms) == {"encode", "language"}
    inside = name in ("fastv", "pyramiddrop")
    score = "language.score" if inside else "encode.score"
    assert set(report.parts) == {score, "encode.compact", *([] if inside else ["compact"])}
    assert 0 < report.parts[score] < report.ms[score.partition(".")[0]]
    assert f"{score}: " in str(report)


def test_a_phase_within_itself_counts_once(monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr("vtprune.engine.timing.now", lambda device: next(ticks) / 1000)
    clock = Clock(torch.device("cpu"))
    with timing(clock, "a"):  # 0
        with part("b"), part("b"):  # 1 to 2
            pass
        with pytest.raises(KeyError), part("b"):  # 3 to 4
            raise KeyError
    assert clock.ms == pytest.approx({"a": 5, "a.b": 2})  # 5
    with part("b"), timing(None, "c"), part("d"):
        pass
    assert set(clock.ms) == {"a", "a.b"}
