"""What lmms-eval makes of ``--model vtprune``: its arguments, its name, its random choices."""

from __future__ import annotations

import json
from importlib.metadata import entry_points
from typing import Any

import pytest
from lmms_eval.utils import simple_parse_args_string

from tests.eval.test_lmms_chat import docs, talk
from vtprune import ConfigError
from vtprune.eval.budgets import CEILING, Point
from vtprune.eval.lmms_model import VtpruneChat, asked_point


@pytest.mark.parametrize(
    ("said", "point"),
    [
        ("pretrained=m", CEILING),
        ("pretrained=m,strategy=hiprune,keep=64", Point("hiprune", "64")),
        ("pretrained=m,strategy=hiprune,keep=0.25", Point("hiprune", "25%")),
        ("pretrained=m,strategy=hiprune,keep=12.5%", Point("hiprune", "12.5%")),
        ("strategy='fastv(layers=(3,))',keep=1.0", Point("fastv(layers=(3,))", "100%")),
        (
            "strategy='zipvl(tau=0.96,others=\"pack\")',dtype=auto",
            Point("zipvl(tau=0.96, others='pack')", "100%"),
        ),
    ],
)
def test_model_args_say_the_point(said, point):
    args: dict[str, Any] = simple_parse_args_string(said)
    assert asked_point(args.get("strategy"), args.get("keep")) == point


def test_a_setting_says_the_point(tmp_path):
    file = tmp_path / "tuned.yaml"
    file.write_text("strategy: hiprune\noptions: {alpha: 0.2}\nkeep: 64\n")
    assert asked_point(str(file), None) == Point("hiprune(alpha=0.2)", "64")
    with pytest.raises(ConfigError, match="keep"):
        asked_point(str(file), 32)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"keep": 64}, "keep=64 without a strategy"),
        ({"strategy": "hiprune"}, "needs keep"),
        ({"strategy": "hiprune", "keep": "many"}, "Budget 'many'"),
        ({"strategy": "shortv", "keep": 0.5}, "takes no keep=0.5"),
        ({"strategy": "fastvlm", "keep": 0.5}, "Did you mean 'fastervlm'"),
        ({"pretraind": "x"}, "Did you mean 'pretrained'.*Known: attn_implementation, batch_size"),
        ({"max_batch_size": 8}, "--batch_size"),
        ({"batch_size": "auto"}, "batch_size='auto'"),
        ({"seed": -1}, "seed=-1"),
        ({"pretrained": ""}, "pretrained is missing"),
        ({"pretrained": "mini-vit"}, "is a ViT"),
        ({"max_pixels": 4096}, "max_pixels=4096"),
        ({"max_pixels": 0}, "max_pixels=0 must be a whole number, 1 or more"),
        ({"num_frames": 8}, "num_frames=8: the model takes no video"),
        ({"attn_implementation": "fast"}, "attn_implementation='fast'"),
        ({"strategy": "hiprune", "keep": 300}, "keep=300, but an image has 256"),
    ],
)
def test_wrong_model_args_are_refused(args, said, model_dir):
    with pytest.raises(ConfigError, match=said):
        VtpruneChat(**{"pretrained": str(model_dir), **args})


def test_lmms_eval_finds_the_model():
    from lmms_eval.models import get_model

    assert "vtprune" in {point.name for point in entry_points(group="lmms_eval.models")}
    assert get_model("vtprune") is VtpruneChat


def test_random_choices_differ_by_batch(model_dir):
    asked = VtpruneChat(str(model_dir), "random", 0.25, batch_size=1)
    assert (asked.rank, asked.world_size, asked.device.type) == (0, 1, asked.model.device.type)
    chosen = []
    for first in (0, 0, 7):
        with asked.wrapping(first) as handle:
            inputs = asked.prompter([talk(docs(1)[0])])
            asked.model.generate(**inputs, max_new_tokens=1)
            chosen.append(json.dumps(handle.selections[0].rows.tolist()))
    assert chosen[0] == chosen[1] != chosen[2]
