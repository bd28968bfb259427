"""Row rules on every family: leaving out equals computing and throwing away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import vtprune
from tests.contracts.bank import BY_ROWS
from tests.engine.rules_reference import projected
from tests.engine.test_generation import OLD
from tests.families import eager as whole
from tests.families import strangers
from tests.families.oracles import gather_is_mask, inputs_of, keeps_all, model_of, plain
from tests.families.test_strategies import FAMILIES
from tests.probes import generate
from tests.projectors import lacks, ready
from vtprune.engine.places import near, places
from vtprune.engine.plan import find_adapter
from vtprune.registry import build, strategy_class, strategy_names
from vtprune.types import Patches, RowRule, Strategy

# Windows go by places, which have a test of their own.
OPTIONS: dict[str, dict[str, Any]] = {
    "yopo": {"window": None, "layercut": 1},
    "yopo renorm": {"window": None, "layercut": 3, "renorm": True},
    "naavit frozen": {"mlp": False, "layers": (1,)},
    "eemllm ffn": {"visual_rows": "ffn"},
    "zipvl": {"tau": 0.8},
}
INSIDE = [name for name in strategy_names() if strategy_class(name).acts_inside]
VARIANTS = [name for name in INSIDE if name in BY_ROWS and strategy_class(name).kind == "compute"]
VARIANTS += [name for name in OPTIONS if name not in VARIANTS]


def visual_of(model: Any, inputs: dict[str, Tensor], length: int) -> Tensor:
    """The visual tokens of the prompts, and none after them, ``[B, length]``."""
    ids = inputs["input_ids"]
    marks = torch.zeros(len(ids), length, dtype=torch.bool)
    for modality in find_adapter(model).modalities:
        marks[:, : ids.shape[1]] |= ids == modality.placeholder
    return marks


def muted(model: Any, inputs: dict[str, Tensor]) -> Any:
    """A hook that makes what a module gives visual rows 0."""

    def after(module: Any, args: Any, output: Any) -> Any:
        made, *more = output if isinstance(output, tuple) else (output,)
        made = made.masked_fill(visual_of(model, inputs, made.shape[1])[:, :, None], 0.0)
        return (made, *more) if more else made

    return after


def alone(model: Any, inputs: dict[str, Tensor]) -> Any:
    """A hook that lets visual rows see themselves alone."""

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"]
        n = mask.shape[-1]
        others = visual_of(model, inputs, n)[:, None, :, None] & ~torch.eye(n, dtype=torch.bool)
        hidden = torch.finfo(mask.dtype).min
        mask = mask.expand(len(others), -1, -1, -1).masked_fill(others, hidden)
        return args, {**kwargs, "attention_mask": mask}

    return before


def left_out(handle: vtprune.Handle, inputs: dict[str, Tensor]) -> dict[int, Tensor]:
    """By layer the tokens of the last call's prompt that probes did not choose, ``[B, L]``."""
    decoding, prompt = handle._decoding, handle._prompt
    assert decoding is not None
    assert prompt is not None
    found = {}
    for number, cut in decoding.chosen.items():
        found[number] = inputs["attention_mask"].bool().clone()
        for b, columns in enumerate(cut.index):
            found[number][b, prompt.index[b, columns[columns >= 0]]] = False
        assert found[number].any()
    return found


def unseen(left: Tensor, drop: bool) -> tuple[Any, Any]:
    """Hooks that hide tokens from those of the prompt, or from all, and let them attend to none."""

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask = kwargs["attention_mask"]
        n = mask.shape[-1]
        hides = F.pad(left, (0, n - left.shape[1]))[:, None, None].expand(-1, -1, n, -1).clone()
        if not drop:
            hides[:, :, left.shape[1] :] = False
        hidden = torch.finfo(mask.dtype).min
        mask = mask.expand(len(left), -1, -1, -1).masked_fill(hides, hidden)
        return args, {**kwargs, "attention_mask": mask}

    def after(module: Any, args: Any, output: Any) -> Any:
        made, *more = output
        silent = F.pad(left, (0, made.shape[1] - left.shape[1]))
        return (made.masked_fill(silent[:, :, None], 0.0), *more)

    return before, after


@torch.no_grad()
def features(family: str, kind: str) -> Tensor:
    """What tokens of the prompt are made of, ``[B, L, C]``; no number where there is no patch."""
    (model, _), inputs = model_of(family, "eager"), inputs_of(family, kind)
    found = torch.empty(0)
    for modality in find_adapter(model).modalities:
        if modality.given(inputs):
            name = modality.name
            weights = whole.mapping(family, kind, name)
            need = Patches(whole.TOWERS[family].feature)
            made = weights @ whole.patches(family, kind, name)[need]
            made[weights.sum(1) == 0] = torch.nan
            if not len(found):
                found = made.new_full((*inputs["input_ids"].shape, made.shape[1]), torch.nan)
            found[inputs["input_ids"] == modality.placeholder] = made
    return found


def making(rule: RowRule, made_of: Tensor) -> Any:
    """A hook that puts what a rule makes in the place of what enters a layer."""
    rows = ~made_of[..., 0].isnan()

    def before(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden = (args[0] if args else kwargs.pop("hidden_states")).clone()
        hidden[:, : rows.shape[1]][rows] = projected(rule.maker, made_of[rows])
        return (hidden, *args[1:]), kwargs

    return before


@contextmanager
def by(
    rules: dict[int, RowRule],
    model: Any,
    inputs: dict[str, Tensor],
    left: dict[int, Tensor] | None = None,
    made_of: Tensor | None = None,
) -> Iterator[None]:
    """Lets ``model`` compute everything for visual rows and throw away what the rules say.

    Of layers in which probes choose, what they ``left`` out.
    """
    layers, zero = find_adapter(model).decoder, muted(model, inputs)
    with ExitStack() as undo:
        for number, rule in rules.items():
            layer: Any = layers[number]
            attention = layer.self_attn
            if rule.maker is not None and made_of is not None:
                hook = layer.register_forward_pre_hook(making(rule, made_of), with_kwargs=True)
                undo.callback(hook.remove)
            if rule.attend == "none":
                undo.callback(attention.register_forward_hook(zero).remove)
            if rule.attend == "chosen":
                before, after = unseen((left or {})[number], rule.others == "drop")
                hook = layer.register_forward_pre_hook(before, with_kwargs=True)
                undo.callback(hook.remove)
                undo.callback(attention.register_forward_hook(after).remove)
            if rule.attend == "self":
                hook = layer.register_forward_pre_hook(alone(model, inputs), with_kwargs=True)
                undo.callback(hook.remove)
            if not rule.mlp:
                undo.callback(layer.mlp.register_forward_hook(zero).remove)
            if not rule.read:
                undo.callback(attention.v_proj.register_forward_hook(zero).remove)
        yield


def given(variant: str, model: Any) -> Strategy:
    return ready(variant.partition(" ")[0], model, **OPTIONS.get(variant, {}))


def rules_of(strategy: Strategy, model: Any) -> dict[int, RowRule]:
    stages = strategy.plan(find_adapter(model).facts)
    return {stage.layer or 0: s for stage in stages if isinstance(s := stage.rule, RowRule)}


def check(family: str, kind: str, variant: str, *first: str, **more: Any) -> vtprune.Handle:
    model = model_of(family)[0]
    inputs, strategy = inputs_of(family, kind), given(variant, model)
    chosen: Any = [*first, strategy] if first else strategy
    rules, left = rules_of(strategy, model), {}
    made_of = features(family, kind) if lacks(strategy.name) else None
    if any(rule.attend == "chosen" for rule in rules.values()):
        with vtprune.wrap(model, chosen, **more) as handle:
            generate(model, inputs, 1)
            left = left_out(handle, inputs)
    with by(rules, model_of(family, "eager")[0], inputs, left, made_of):
        return gather_is_mask(family, inputs, {"strategy": chosen, **more})


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_left_out_equals_thrown_away(family, variant):
    report = check(family, "ragged", variant).report()
    assert report.prefill().share < 1
    assert {stage.kept for stage in report.stages} <= {0}


@pytest.mark.parametrize("variant", ["shortv", "eemllm", "saisa"])
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("gemma3", "mixed"),
        ("llava", "mixed"),
        ("llava_next_video", "video_and_image"),
        ("qwen2_5_vl", "video_and_image"),
    ],
)
def test_rows_without_images_and_videos_beside_images(family, kind, variant):
    check(family, kind, variant)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize(("first", "keep"), [("divprune", 0.5), ("fastv", 0.4)])
def test_behind_a_strategy_that_drops(family, first, keep):
    for name in ("shortv", "eemllm", "saisa", "zipvl"):
        handle = check(family, "ragged", name, first, keep=keep)
        report = handle.report()
        left = [image.kept < image.tokens for image in report.images]
        assert any(left) or any(stage.kept < stage.tokens for stage in report.stages)


def test_rules_of_one_model_do_not_touch_another_of_its_class():
    model, inputs = model_of("llava")[0], inputs_of("llava", "ragged")
    other = model_of("llava", "eager")[0]
    with vtprune.wrap(other, "shortv"):
        ids, logits = generate(model, inputs, 10)
    assert torch.equal(logits, plain("llava", "ragged")[1])
    keeps_all("llava", "ragged", "divprune")
    assert torch.equal(ids, plain("llava", "ragged")[0])


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_vl", "qwen2_5_vl"])
def test_a_window_of_every_neighbour_there_is(family):
    """A radius beyond any image: visual tokens see all of their image or tile, and no other."""
    model, inputs = model_of(family)[0], inputs_of(family, "ragged")
    with vtprune.wrap(model, "divprune", keep=1.0) as handle:
        model(**inputs)
    where = places(inputs["input_ids"], handle._items)
    close = near(where, 1000)
    for b, row in enumerate(where):
        same = (row[:, None, :2] == row[None, :, :2]).all(-1) & (row[:, None, 0] >= 0)
        assert torch.equal(close[b], same | torch.eye(len(row), dtype=torch.bool))
    beside = near(where, 1).sum(-1)[where[..., 0] >= 0]
    assert int(beside.max()) == 9
    corners = len({tuple(place) for place in where[where[..., 0] >= 0][:, :2].tolist()}) * 4
    assert int((beside == 4).sum()) == corners


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in ("yopo renorm", "saisa")])
@pytest.mark.parametrize("name", strangers.BUILD)
def test_families_without_an_adapter(name, variant):
    if name == "vipllava" and OLD:
        pytest.skip("transformers before 5.19 does not run it, wrapped or not")
    (model, inputs, _), (eager, _, _) = strangers.build(name), strangers.build(name, "eager")
    strategy = build(variant.partition(" ")[0], **OPTIONS.get(variant, {}))
    rules = rules_of(strategy, model)
    here = inputs["attention_mask"].bool()
    with torch.no_grad(), vtprune.wrap(model, strategy) as handle:
        made = model(**inputs).logits
    with torch.no_grad(), by(rules, eager, inputs, left_out(handle, inputs)):
        wanted = eager(**inputs).logits
    assert (made - wanted)[here].abs().max() < 1e-4
