"""Row rules: one that is as ever is bit-identical; each equals the whole layers by definition."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import vtprune
from tests import tiny
from tests.contracts.bank import BY_ROWS
from tests.engine.rules_reference import reference
from tests.probes import generate
from tests.projectors import ready
from vtprune import ConfigError, UnsupportedError
from vtprune.engine import tap
from vtprune.engine.report import RuleReport
from vtprune.errors import HookError
from vtprune.registry import build, strategy_class, strategy_names
from vtprune.strategies._compute import Compute
from vtprune.types import Facts, RowRule


def turned() -> dict[str, Tensor]:
    """As ``tiny.ragged``, the row with more images first: it has fewer rows that pass."""
    return tiny.batch(tiny.prompt(4, 3, 2, seed=3), tiny.prompt(2, 6, 1, seed=2))


BATCHES = {"one": tiny.one_image, "ragged": tiny.ragged, "turned": turned}
INSIDE = [name for name in strategy_names() if strategy_class(name).acts_inside]
NAMES = [name for name in INSIDE if name in BY_ROWS and strategy_class(name).kind == "compute"]
AS_EVER = RowRule()
RULES = {
    "frozen": RowRule(attend="none", mlp=0.0),
    "not attending": RowRule(attend="none"),
    "themselves": RowRule(attend="self"),
    "themselves alone": RowRule(attend="self", mlp=0.0),
    "no MLP": RowRule(mlp=0.0),
    "half an MLP": RowRule(mlp=0.5),
    "neighbours": RowRule(attend="window", radius=1),
    "one head": RowRule(heads=(1,)),
    "no head": RowRule(heads=()),
    "unread": RowRule(read=False),
    "all at once": RowRule(attend="window", mlp=0.25, radius=2, heads=(0,), read=False),
    "themselves in a head": RowRule(attend="self", heads=(0,)),
    "not attending, read in a head": RowRule(attend="none", heads=(0,)),
}


@dataclass(frozen=True)
class Given(Compute):
    """One rule for all its layers."""

    given: RowRule = AS_EVER

    def rule(self, layer: int, facts: Facts) -> RowRule:
        return self.given


def said(handle: vtprune.Handle) -> RuleReport:
    """What the report says of rules."""
    rules = handle.report().rules
    assert rules is not None
    return rules


def rules_of(handle: vtprune.Handle) -> dict[int, RowRule]:
    return handle._computing.rules


def assert_by_definition(model, inputs, strategy, **options):
    strategy = ready(strategy, model) if isinstance(strategy, str) else strategy
    with vtprune.wrap(model, strategy) as handle:
        ids, logits = generate(model, inputs, **options)
        report = handle.report()
    wanted_ids, wanted = reference(model, inputs, rules_of(handle))
    assert torch.equal(ids, wanted_ids)
    assert (logits - wanted).abs().max() < 1e-4
    return report


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", BATCHES)
def test_a_rule_that_changes_nothing_is_bit_identical(shape, attention):
    model, inputs = tiny.build(attention=attention), BATCHES[shape]()
    ids, logits = generate(model, inputs)
    plain = model(**inputs).logits
    with vtprune.wrap(model, Given()) as handle:
        same_ids, same_logits = generate(model, inputs)
        assert torch.equal(plain, model(**inputs).logits)
        rules = handle.report().rules
    assert torch.equal(ids, same_ids)
    assert torch.equal(logits, same_logits)
    assert rules is not None
    assert (rules.published, rules.realised) == (1.0, 1.0)
    assert rules.layers == {"as ever": (0, 1, 2, 3)}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", BATCHES)
@pytest.mark.parametrize("name", NAMES)
def test_a_strategy_equals_its_rules_by_definition(name, shape, attention):
    report = assert_by_definition(tiny.build(attention=attention), BATCHES[shape](), name)
    assert report.rules is not None
    assert report.rules.published < 1
    assert report.rules.realised < 1
    assert all(image.kept == tiny.N for image in report.images)


@pytest.mark.parametrize("layers", [(2,), (0, 1, 2, 3)])
@pytest.mark.parametrize("rule", RULES)
def test_a_rule_equals_its_definition(rule, layers):
    for attention in ("sdpa", "eager"):
        model = tiny.build(attention=attention)
        assert_by_definition(model, tiny.ragged(), Given(given=RULES[rule], layers=layers))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", BATCHES)
@pytest.mark.parametrize("rule", RULES)
def test_a_static_cache(rule, shape, attention):
    model, strategy = tiny.build(attention=attention), Given(given=RULES[rule])
    assert_by_definition(model, BATCHES[shape](), strategy, cache_implementation="static")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", BATCHES)
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}])
def test_visual_tokens_that_leave_behind_rules(shape, attention, options):
    model, inputs = tiny.build(attention=attention), BATCHES[shape]()
    strategy = build("yopo", window=3, layercut=2, renorm=True, mlp_ratio=2)
    with vtprune.wrap(model, strategy) as handle:
        ids, logits = generate(model, inputs, **options)
        report = handle.report()
    assert set(rules_of(handle)) == {0, 1}
    assert report.rules is not None
    assert report.rules.published < 0.5
    assert report.prefill().share < report.rules.realised
    assert all((stage.layer, stage.kept) == (2, 0) for stage in report.stages)
    wanted_ids, wanted = reference(model, inputs, rules_of(handle), gone=2)
    assert torch.equal(ids, wanted_ids)
    assert (logits - wanted).abs().max() < 1e-4


def test_rows_without_images():
    inputs = tiny.batch(tiny.prompt(2, 40, 0, seed=5), tiny.prompt(3, 4, 1, seed=6))
    for name in NAMES:
        assert_by_definition(tiny.build(), inputs, name)


# -- ways of calling -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_decode_loop_by_hand(name):
    model, inputs = tiny.build(), tiny.ragged()
    with vtprune.wrap(model, ready(name, model)):
        wanted, _ = generate(model, inputs, n=5)
        out, mask, ids = model(**inputs), inputs["attention_mask"], []
        for _ in range(5):
            scores = out.logits[:, -1].index_fill(1, torch.tensor([tiny.IMAGE]), -1e30)
            ids.append(scores.argmax(-1))
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
            out = model(
                input_ids=ids[-1][:, None],
                attention_mask=mask,
                past_key_values=out.past_key_values,
            )
    assert torch.equal(torch.stack(ids, 1), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_beams_and_several_sequences(name):
    model, inputs = tiny.build(), tiny.one_image()
    options = {"max_new_tokens": 6, "do_sample": False}
    with vtprune.wrap(model, ready(name, model)) as handle:
        greedy = model.generate(**inputs, **options)
        realised = said(handle).realised
        beams = model.generate(**inputs, **options, num_beams=3, num_return_sequences=3)
        assert said(handle).realised == pytest.approx(realised)
        options = {**options, "do_sample": True, "top_k": 1}
        twice = model.generate(**inputs, **options, num_return_sequences=2)
    assert torch.equal(twice, greedy.expand(2, -1))
    assert beams.shape == (3, greedy.shape[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", RULES)
def test_half_precision(rule, dtype):
    model, inputs = tiny.build().to(dtype), tiny.ragged()
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with vtprune.wrap(model, Given(given=RULES[rule])):
        logits = model(**inputs).logits
    assert logits.dtype == dtype
    assert logits[inputs["attention_mask"].bool()].isfinite().all()


def watch(states, number):
    def after(module, args, output):
        states[number] = [args[0], output]

    return after


@pytest.mark.parametrize("first", ["divprune", "fastv"])
def test_with_strategies_that_drop(first):
    """Frozen rows behind a cut are the visual tokens that are left, wherever they are."""
    model, inputs = tiny.build(), tiny.ragged()
    states: dict[int, list[torch.Tensor]] = {}
    with vtprune.wrap(model, [first, build("shortv", layers=(1, 3))], keep=9) as handle:
        for number, layer in enumerate(model.model.language_model.layers):
            layer.register_forward_hook(watch(states, number))
        model(**inputs)
        columns = handle.final
    assert columns is not None
    ids = inputs["input_ids"].gather(1, columns.clamp(min=0))
    visual = (ids == tiny.IMAGE) & (columns >= 0)
    before, after = states[3]
    assert visual.any(1).all()
    assert torch.equal(before[visual], after[visual])
    assert not torch.equal(before[~visual], after[~visual])


def test_labels_and_gradients_are_as_ever():
    model, inputs = tiny.build(), tiny.one_image()
    with vtprune.wrap(model, "shortv"):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
    assert model.lm_head.weight.grad.isfinite().all()


def test_nothing_is_left_on_the_model():
    model, inputs = tiny.build(), tiny.one_image()
    before = model(**inputs).logits

    def hooks() -> list[int]:
        return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]

    had = hooks()
    for name in NAMES:
        vtprune.wrap(model, ready(name, model)).remove()
    assert hooks() == had
    assert torch.equal(model(**inputs).logits, before)


# -- what is said and what is refused --------------------------------------------------------------


def test_the_report_says_layers_rules_and_shares():
    model, inputs = tiny.build(), tiny.one_image()
    with vtprune.wrap(model, "shortv", layers=(1, 3)) as handle:
        model(**inputs)
        rules, report = said(handle), handle.report()
    text, n, words = model.config.text_config, tiny.N, inputs["input_ids"].shape[1] - tiny.N
    d, m = text.hidden_size, text.intermediate_size
    whole = 4 * n * d**2 + 2 * n**2 * d + 3 * n * d * m
    assert rules.layers == {"no attention, no MLP": (1, 3)}
    assert rules.published == pytest.approx((2 * whole + 2 * (2 * n * d**2)) / (4 * whole))
    rows, weights = n + words, 2 * d**2 + d**2 + 3 * d * m  # 2 of 4 heads have keys and values
    full = rows * weights + 2 * rows**2 * d
    left = rows * d**2 + words * (weights - d**2) + 2 * words * rows * d
    assert rules.realised == pytest.approx((2 * full + 2 * left) / (4 * full))
    assert "layers [1, 3]: no attention, no MLP" in str(report)


def test_keep_is_refused_or_given_to_the_others():
    model = tiny.build()
    with pytest.raises(ConfigError, match=r"keep=0.5: shortv lets no token leave. Leave keep out"):
        vtprune.wrap(model, "shortv", keep=0.5)
    with pytest.raises(ConfigError, match="gives 2 budgets for 1 strategies"):
        vtprune.wrap(model, ["divprune", "shortv"], keep=[0.5, 0.5])
    with pytest.raises(ConfigError, match="keep is missing"):
        vtprune.wrap(model, ["divprune", "shortv"])
    vtprune.wrap(model, ["divprune", "shortv"], keep=0.5).remove()
    with pytest.raises(ConfigError, match="Two strategies say what layer 0 computes"):
        vtprune.wrap(model, ["shortv", "naavit"])
    with pytest.raises(ConfigError, match=r"decoder layers 0 to 3 to act in"):
        vtprune.wrap(model, "naavit", layers=(4,))


@pytest.mark.parametrize("options", [{"use_cache": False}, {"prefill_chunk_size": 8}])
def test_ways_of_generating_that_read_the_prompt_in_pieces_or_again(options):
    model, inputs = tiny.build(), tiny.one_image()
    with (
        vtprune.wrap(model, "shortv"),
        pytest.raises(UnsupportedError, match="does not go with a strategy that acts inside"),
    ):
        model.generate(**inputs, max_new_tokens=2, **options)


def test_parts_that_a_layer_does_not_have():
    model = tiny.build()
    layer = model.model.language_model.layers[2]
    layer.feed_forward = layer.mlp
    del layer.mlp
    with pytest.raises(UnsupportedError, match=r"Layer has no 'mlp' .* it has self_attn"):
        vtprune.wrap(model, "shortv", layers=(2,))
    with pytest.raises(UnsupportedError, match="is no MLP of gate_proj, up_proj and down_proj"):
        tiny_model = tiny.build()
        tiny_model.model.language_model.layers[1].mlp = torch.nn.Linear(32, 32)
        vtprune.wrap(tiny_model, "yopo", mlp_ratio=2)


def test_heads_that_there_are_not():
    with pytest.raises(ConfigError, match=r"heads=\(0, 2\): layer 0 has heads 0 to 1"):
        vtprune.wrap(tiny.build(), "yopo", heads=((0, 2),) * 4)


def test_an_attention_that_takes_no_mask():
    model, inputs = tiny.build(), tiny.one_image()
    text = model.model.language_model.config
    text._attn_implementation = "flash_attention_2"
    with pytest.raises(UnsupportedError, match="'flash_attention_2' takes no mask for some of"):
        vtprune.wrap(model, "shortv")
    vtprune.wrap(model, Given(given=RULES["no MLP"])).remove()
    text._attn_implementation = "sdpa"
    with vtprune.wrap(model, "shortv"):
        model(**inputs)


def test_an_attention_that_goes_another_way(monkeypatch):
    model, inputs = tiny.build(), tiny.one_image()
    monkeypatch.setattr(tap, "_pass_through", lambda original: original)
    with (
        vtprune.wrap(model, "eemllm"),
        pytest.raises(HookError, match="did not call the attention interface"),
    ):
        model(**inputs)
