"""Every wrong argument or input gets an error that says what was given and what to do."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import vtprune
from tests import tiny
from vtprune import ConfigError, InputError, UnsupportedError, _versions
from vtprune.types import ClsRow, Facts, InstructionText, Need, Signals, Site, Stage, Strategy


@dataclass(frozen=True)
class Wants(Strategy):
    """Reads what it is told to."""

    need: Need

    def needs(self, facts: Facts) -> tuple[Need, ...]:
        return (self.need,)

    def score(self, signals: Signals) -> Tensor:
        return signals.tokens.norm(dim=-1)


@pytest.fixture(scope="module")
def model():
    return tiny.build()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"strategy": "fastvlm"}, "Unknown strategy 'fastvlm'. Did you mean 'fastervlm'"),
        ({"strategy": 3}, "neither a name nor a Strategy"),
        ({"strategy": []}, "names none"),
        ({"strategy": "random", "sede": 1}, "Unknown option of random 'sede'. Did you mean 'seed'"),
        ({"strategy": "random", "seed": -1}, "seed=-1"),
        ({"strategy": "vtc_cls", "start": 24}, "start=24"),
        ({"strategy": "visionzip", "contextual": -1}, "contextual=-1"),
        ({"strategy": "random", "layers": (1,)}, "random reads no layer"),
        ({"strategy": "fastervlm", "layers": (3,)}, "blocks 0 to 2"),
        ({"strategy": "fastervlm", "layers": ()}, "distinct"),
        ({"positions": "shuffle"}, "positions='shuffle'"),
        ({"reduce": 8}, "reduce=8"),
        ({"text_encoder": object()}, "text_encoder"),
        ({"keep": None}, "keep is missing"),
        ({"keep": 0}, "keep=0 keeps nothing"),
        ({"keep": -1}, "keep=-1"),
        ({"keep": True}, "keep=True is not a budget"),
        ({"keep": 1.5}, "keep=1.5 is not a share"),
        ({"keep": float("nan")}, "keep=nan"),
        ({"keep": 0.0}, "keep=0.0"),
        ({"keep": "64"}, "keep='64'"),
        ({"keep": 37}, "keep=37, but an image has 36 tokens"),
        ({"keep": [9, 4]}, "2 budgets for 1"),
        ({"strategy": Wants(InstructionText())}, "pass processor="),
    ],
)
def test_wrap_refuses(model, arguments, message):
    before = dict(vars(model))
    with pytest.raises(ConfigError) as error:
        vtprune.wrap(model, **{"strategy": "strided", "keep": 9, **arguments})
    assert message in str(error.value)
    assert vars(model).keys() == before.keys()


def test_layers_and_options_of_a_list_go_on_the_instances(model):
    with pytest.raises(ConfigError, match="on their instances"):
        vtprune.wrap(model, ["random", "strided"], keep=[9, 4], seed=3)
    with pytest.raises(UnsupportedError, match="must come first"):
        vtprune.wrap(model, ["random", "visionzip"], keep=[9, 4])


def test_text_inside_the_encoder_is_refused(model):
    @dataclass(frozen=True)
    class Early(Strategy):
        def plan(self, facts: Facts) -> tuple[Stage, ...]:
            return (Stage(Site.ENCODER, (InstructionText(),)),)

    with pytest.raises(UnsupportedError, match="reads the instruction inside the encoder"):
        vtprune.wrap(model, Early(), keep=9, processor=object())


def test_the_error_names_who_reads_the_instruction(model):
    with pytest.raises(ConfigError, match=r"^trim reads the instruction; pass processor="):
        vtprune.wrap(model, ["divprune", "trim"], keep=[9, 4])


def test_unknown_family():
    small = LlamaConfig(
        vocab_size=10,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    with pytest.raises(UnsupportedError, match=r"LlamaForCausalLM.*LlavaForConditionalGeneration"):
        vtprune.wrap(LlamaForCausalLM(small), "random", keep=9)
    with pytest.raises(ConfigError, match="takes a transformers model"):
        vtprune.wrap(torch.nn.Linear(2, 2), "random", keep=9)  # pyright: ignore[reportArgumentType]


def test_a_signal_that_the_family_cannot_give():
    siglip = tiny.build("siglip")
    with pytest.raises(UnsupportedError, match=r"needs ClsRow\(layer=2\); LLaVA-1.5 \(siglip"):
        vtprune.wrap(siglip, Wants(ClsRow(2)), keep=9)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("vision_feature_layer", [-2, -1], "features of several layers"),
        ("vision_feature_layer", 0, "names no block"),
        ("vision_feature_select_strategy", "full", "use 'default'"),
    ],
)
def test_configurations_that_cannot_work(setting, value, message):
    odd = tiny.build()
    setattr(odd.config, setting, value)
    with pytest.raises(UnsupportedError, match=message):
        vtprune.wrap(odd, "fastervlm", keep=9)


def test_placeholders_and_images_disagree(model):
    inputs = tiny.ragged()
    fewer = {**inputs, "pixel_values": inputs["pixel_values"][:2]}
    without = {k: v for k, v in inputs.items() if k != "pixel_values"}
    moved = {**inputs, "input_ids": inputs["input_ids"].clone()}
    moved["input_ids"][0, -1], moved["input_ids"][1, -5] = tiny.IMAGE, 5
    with vtprune.wrap(model, "strided", keep=9):
        for call in (lambda i: model.generate(**i, max_new_tokens=1), lambda i: model(**i)):
            with pytest.raises(InputError, match=r"hold 108 image placeholders.* 2 images give 72"):
                call(fewer)
            with pytest.raises(InputError, match="no pixel_values were given"):
                call(without)
            with pytest.raises(InputError, match="no whole number of its images"):
                call(moved)
        assert model.generate(**inputs, max_new_tokens=1).shape[0] == 2


def test_calls_that_hide_the_prompt(model):
    inputs = tiny.one_image()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    encoded = model.model.get_image_features(inputs["pixel_values"], return_dict=True)
    pixels = inputs["pixel_values"]
    with vtprune.wrap(model, "strided", keep=9):
        for call in (lambda **i: model.generate(**i, max_new_tokens=1), model):
            with pytest.raises(UnsupportedError, match="inputs_embeds was given"):
                call(inputs_embeds=embeds, pixel_values=pixels)
            with pytest.raises(UnsupportedError, match="mm_encoder_outputs was given"):
                call(input_ids=inputs["input_ids"], mm_encoder_outputs={"image": encoded})
            with pytest.raises(UnsupportedError, match="holds 3 tokens"):
                call(**inputs, past_key_values=cache)
            with pytest.raises(UnsupportedError, match="cannot be changed per call"):
                call(**inputs, vision_feature_layer=-1)
        with pytest.raises(UnsupportedError, match="Continuous batching"):
            model.generate(**inputs, cache_implementation="paged")
        with pytest.raises(UnsupportedError, match="2-D mask"):
            model(**{**inputs, "attention_mask": torch.ones(1, 1, 44, 44)})
        with pytest.raises(UnsupportedError, match="logits_to_keep"):
            model(**inputs, logits_to_keep=torch.tensor([3]))


def test_a_strategy_that_returns_the_wrong_count_is_named(model):
    @dataclass(frozen=True)
    class Short(Strategy):
        def select(self, signals, k):
            return vtprune.Selection(torch.zeros(1, k - 1, dtype=torch.int64), signals.n)

    with vtprune.wrap(model, Short(), keep=9), pytest.raises(InputError, match="asked were"):
        model.generate(**tiny.one_image(), max_new_tokens=1)


def test_select_on_bare_tensors_names_what_is_missing():
    signals = Signals(torch.randn(2, 20, 4))
    with pytest.raises(InputError, match="no ClsRow or Received; they hold: none"):
        vtprune.select("fastervlm", keep=5, signals=signals)
    with pytest.raises(ConfigError, match="keep=21, but an image has 20"):
        vtprune.select("divprune", keep=21, signals=signals)
    assert vtprune.select("divprune", keep=0.25, signals=signals).rows.shape == (2, 5)
    with pytest.raises(InputError, match=r"nothing of layers \[3\]"):
        vtprune.select("fastervlm", keep=5, signals=signals, layers=(3,))


def test_select_reads_only_the_layers_asked_for():
    low, high = torch.arange(20.0).expand(2, -1), torch.arange(20.0).flip(0).expand(2, -1)
    signals = Signals(torch.randn(2, 20, 4), values={ClsRow(1): low, ClsRow(2): 9 * high})
    chosen = vtprune.select("fastervlm", keep=2, signals=signals, layers=(1,))
    assert chosen.rows.tolist() == [[18, 19]] * 2
    assert vtprune.select("fastervlm", keep=2, signals=signals).rows.tolist() == [[0, 1]] * 2


def test_old_transformers_is_named():
    with pytest.raises(ImportError, match=r"5\.17\.0 is installed.*transformers>=5.18"):
        _versions.check("5.17.0")
    for version in ("5.18.0", "5.23.1", "6.0.0.dev0"):
        _versions.check(version)
