"""Training the projectors of SAISA: what is packed and minimised, going on where it stopped."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from typer.testing import CliRunner

import vtprune
from tests.projectors import of
from vtprune.errors import ConfigError, UnsupportedError
from vtprune.eval import scenes, train_packing, train_saisa
from vtprune.eval.cli import app
from vtprune.eval.train_data import choose
from vtprune.eval.train_saisa import Course, Distillation, Training, begin, separate
from vtprune.projectors import load
from vtprune.registry import build

COURSE = Course(steps=6, batch=1, lr=5e-3)


@pytest.fixture(scope="module")
def school(loaded) -> Distillation:
    return Distillation(*loaded)


def few(number: int, n: int = 3) -> scenes.Scene:
    """A scene with its first questions alone."""
    scene = scenes.make_scene(number, "train")
    return dataclasses.replace(scene, questions=tuple(choose(scene.questions)[:n]))


@pytest.mark.parametrize("block", [False, True])
@torch.no_grad()
def test_packed_questions_are_read_as_each_alone(block, school):
    """With the block too: what is trained is what ``wrap`` runs."""
    made, model = [few(1), few(2, 2)], school.model
    packed, projectors = school.pack(made), of(model)
    if block:
        with school.with_block(projectors, packed):
            states = school.states(packed)[-1]
    else:
        states = school.states(packed)[-1]
    logits = model.lm_head(states)
    assert packed.told.sum(1)[0] > packed.told.sum(1)[1] > 0
    length = int((packed.mask.shape[-1] - int(packed.visual[0].nonzero()[-1]) - 1) / 3)
    for b, scene in enumerate(made):
        for number, question in enumerate(scene.questions):
            inputs = school.pack.ask([question.text], [scene.image])
            if block:
                with vtprune.wrap(model, "saisa", projectors=projectors):
                    alone = model(**inputs).logits[0]
            else:
                alone = model(**inputs).logits[0]
            prefix = int(packed.visual[b].nonzero()[-1]) + 1
            words = inputs["input_ids"].shape[1] - prefix
            at = prefix + number * length
            torch.testing.assert_close(
                logits[b, at : at + words], alone[prefix:], rtol=1e-3, atol=1e-3
            )


def test_packed_questions_that_are_read_otherwise(school, monkeypatch):
    school.check(few(3))
    right = train_packing.packed_positions
    wrong = lambda *args: right(*args) + (right(*args) > 100) * 50  # noqa: E731
    monkeypatch.setattr(train_packing, "packed_positions", wrong)
    with pytest.raises(UnsupportedError, match="does not read questions packed into one prompt"):
        school.check(few(3))


def test_the_whole_model_has_no_loss(school, monkeypatch):
    """Where nothing is replaced there is nothing to learn, but for tokens that are not used."""
    packed, projectors = school.pack([few(4)]), of(school.model)
    monkeypatch.setattr(train_saisa, "build", lambda name, **_: build("random"))
    losses = school.losses(projectors, packed)
    assert abs(float(losses["answer"])) < 1e-5
    assert float(losses["words"]) < 1e-10
    assert float(losses["tokens"]) > 0.1


def test_it_begins_with_the_projector_of_the_model(school):
    shared = begin(school.adapter, 96, COURSE)
    own = school.model.model.multi_modal_projector
    assert torch.equal(shared.of(5).linear_2.weight, own.linear_2.weight)
    assert shared.of(0) is shared.of(11)
    each = separate(shared)
    assert each.of(0) is not each.of(11)
    assert torch.equal(each.of(0).linear_1.bias, each.of(11).linear_1.bias)
    other = begin(school.adapter, 64, COURSE)
    assert other.of(0).linear_1.in_features == 64
    again = begin(school.adapter, 64, COURSE)
    assert torch.equal(other.of(0).linear_1.weight, again.of(0).linear_1.weight)


def test_the_loss_falls_and_an_interrupted_course_goes_on(school, tmp_path, monkeypatch):
    monkeypatch.setattr(train_saisa, "EVERY", 2)
    whole = Training(school, COURSE, tmp_path / "whole", "this")
    projectors, told = whole.run(), []
    totals = [sum(losses.values()) for losses in whole.losses]
    assert min(totals[-2:]) < 0.9 * totals[0]
    assert not torch.equal(projectors.of(0).linear_1.weight, projectors.of(1).linear_1.weight)
    assert all(p.grad is None for p in school.model.parameters())

    def stop(n: int) -> None:
        told.append(n)
        if len(told) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Training(school, COURSE, tmp_path / "part", "this").run(stop)
    again: list[int] = []
    second = Training(school, COURSE, tmp_path / "part", "this")
    found = second.run(again.append)
    assert (told, again) == ([0, 1, 1, 1], [2, 1, 1, 1, 1])
    assert second.losses == whole.losses
    for name, value in projectors.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name
    with pytest.raises(ConfigError, match="holds the training of another model"):
        Training(school, COURSE, tmp_path / "part", "that")
    with pytest.raises(ConfigError, match="or with other options"):
        Training(school, dataclasses.replace(COURSE, lr=1e-4), tmp_path / "part", "this")


def test_the_command_writes_projectors(tmp_path, model_dir, loaded):
    out = tmp_path / "projectors.safetensors"
    words = ("train", "saisa", "--model", str(model_dir), "--samples", "8", "--out", str(out))
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "on the last scenes" in result.output
    assert load(str(out)).depth == 12
    assert (tmp_path / "projectors.safetensors.training").exists()
    vtprune.wrap(loaded[0], "saisa", projectors=str(out)).remove()
    result = CliRunner().invoke(app, (*words[:-1], str(tmp_path / "absent" / "x")))
    assert result.exit_code == 2
    assert "there is no folder" in " ".join(result.stderr.split())
