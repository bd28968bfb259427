"""The pictures of a report, of an untrained model on held-out scenes."""

from __future__ import annotations

import base64
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.eval.report_folder import SETTINGS, Page, answers, write
from vtprune import ConfigError, wrap
from vtprune.eval import report_charts as charts
from vtprune.eval import shipped
from vtprune.eval.budgets import Point, points
from vtprune.eval.regions import in_mean_color
from vtprune.eval.report import Pictures, write_report
from vtprune.eval.report_data import read_run
from vtprune.eval.report_overlays import (
    CHOSEN,
    asked_for,
    by_size,
    data_uri,
    disagreements,
    gallery,
    outline,
    shade,
)
from vtprune.eval.report_seen import Seer
from vtprune.eval.rows import Answer
from vtprune.eval.samples import TASKS, Asker
from vtprune.eval.samples_vit import VIT_TASKS
from vtprune.eval.show import kept_mask
from vtprune.eval.sweep import seeded, settings_of

STRATEGIES = ("random", "divprune", "visionzip", "yopo")


@pytest.fixture(scope="module")
def swept_folder(tmp_path_factory, model_dir):
    """A sweep as the untrained model could have had it; its answers are made up."""
    model, processor = shipped.load(str(model_dir))
    settings = settings_of(
        model, processor, str(model_dir), task="scenes", limit=6, batch_size=2, seed=3
    )
    rows = [
        Answer(
            *("scenes", s.index, s.kind, point.strategy, point.budget, s.question, s.expected),
            *("6", (s.index + len(point.budget)) % 3 == 0, 256, 256.0 if i < 2 else 64.0 / i, 0.5),
        )
        for i, point in enumerate(points(STRATEGIES, ["25%", "20"]))
        for s in TASKS["scenes"].load(0, 6)
    ]
    return write(tmp_path_factory.mktemp("sweeps") / "run", settings, rows, [])


@pytest.fixture
def swept(swept_folder):
    return read_run(swept_folder).swept


def pixels(uri):
    head, _, code = uri.partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(code))) as image:
        return np.asarray(image)


def test_the_pictures_are_what_was_kept(swept, loaded):
    found = gallery(swept, [3])
    (drawn,) = found.drawn
    (sample,) = TASKS["scenes"].load(3, 4)
    assert (drawn.width, drawn.height) == sample.image.size
    assert np.abs(pixels(drawn.picture).astype(int) - np.asarray(sample.image)).max() <= 1
    assert found.budgets == ["25%", "20"]
    assert [card.strategy for card in drawn.cards] == ["random", "divprune", "visionzip"]
    assert found.note == "Not drawn, since all their tokens stay: yopo."
    model, processor = loaded
    for card in drawn.cards[:2]:
        for overlay, keep in zip(card.overlays, (0.25, 20), strict=True):
            assert overlay is not None
            assert overlay.answer.point.strategy == card.strategy
            inputs = Asker(processor)([sample.question], [sample.image])
            strategy = seeded(card.strategy, 3, 2)  # the batch of two that begins with sample 2
            with torch.no_grad(), wrap(model, strategy, keep=keep, processor=processor) as handle:
                model(**inputs)
                lit = kept_mask(handle, inputs["input_ids"])
            alpha = pixels(overlay.shade)[..., 3]
            assert np.array_equal(alpha == 0, lit)
            assert lit.sum() == (64 if keep == 0.25 else 20)
            assert overlay.frame.startswith("M")


def test_what_merged_has_one_color():
    seen = np.random.default_rng(0).random((8, 12, 3)).astype(np.float32)
    regions = np.array([[0, 0, -1], [0, 2, 1]])
    made = pixels(shade(seen, regions))
    mean = (in_mean_color(seen, regions)[0, 0] * 255).round()
    assert np.array_equal(made[0, 0], [*mean, 255])
    assert np.array_equal(made[0, 0], made[1, 0])
    assert made[0, 2].tolist() == [0, 0, 0, 199]
    assert made[1, 1, 3] == made[1, 2, 3] == 0  # tokens of one patch stay as they were


def test_the_outline_goes_around_regions():
    seen = np.zeros((8, 12, 3), dtype=np.float32)
    path = outline(seen, np.array([[0, -1, -1], [0, -1, -1]]))
    assert path == "M4 0V4M4 4V8"
    assert outline(seen, np.array([[0, 0, 0], [1, 1, 1]])) == "M0 4H4M4 4H8M8 4H12"


def test_a_picture_survives():
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert np.array_equal(pixels(data_uri(image)), image)


def test_samples_that_strategies_disagree_on(tmp_path):
    swept = read_run(write(tmp_path / "run")).swept
    assert swept is not None
    # 0 and 1: all right but for nothing; 2, 3 split at 25 %, 4 at 50 %; even ones are 'read'.
    assert disagreements(swept, 2) == [("scenes", 2), ("scenes", 3)]
    assert disagreements(swept, 4) == [("scenes", n) for n in (2, 3, 4, 5)]
    assert len(disagreements(swept, 99)) == 6
    rows = [*answers(), *answers("scenes-hard")]
    both = read_run(write(tmp_path / "two", replace(SETTINGS, task="scenes,scenes-hard"), rows))
    assert both.swept is not None
    assert asked_for(both.swept, [5, 1]) == [
        *(("scenes", 5), ("scenes", 1), ("scenes-hard", 5), ("scenes-hard", 1))
    ]
    assert {task for task, _ in disagreements(both.swept, 4)} == {"scenes", "scenes-hard"}


def test_budgets_by_what_they_keep(swept):
    assert by_size(swept, [Point("random", "20"), Point("random", "25%")]) == ["25%", "20"]


def test_a_few_are_chosen_and_told(swept):
    told = []
    found = gallery(swept, (), tell=lambda done, of: told.append((done, of)))
    assert len(found.drawn) == CHOSEN
    assert told == [(n, CHOSEN) for n in range(CHOSEN + 1)]
    assert found.start == 1


def page_of(folder, tmp_path, pictures, monkeypatch):
    monkeypatch.setattr(charts, "library", lambda: "1")
    notes = write_report([folder], tmp_path / "x.html", pictures)
    return notes, Page((tmp_path / "x.html").read_text(encoding="utf-8"))


def test_the_page_has_them(swept_folder, tmp_path, monkeypatch):
    _, page = page_of(swept_folder, tmp_path, Pictures(samples=(3, 4)), monkeypatch)
    (slider,) = [a for tag, a in page.tags if tag == "input" and a["type"] == "range"]
    assert (slider["min"], slider["max"], slider["value"]) == ("0", "1", "1")
    assert slider["data-names"] == '["25%", "20"]'
    assert [a["for"] for tag, a in page.tags if tag == "label" and "for" in a] == [slider["id"]]
    steps = [a for _, a in page.tags if "data-step" in a]
    assert len(steps) == 2 * 3 * 2
    assert all(("hidden" in a) == (a["data-step"] == "0") for a in steps)
    pictures = [a["id"] for tag, a in page.tags if tag == "image" and "id" in a]
    used = {a["href"][1:] for tag, a in page.tags if tag == "use"}
    assert len(pictures) == 2
    assert used == set(pictures)
    assert TASKS["scenes"].load(4, 5)[0].question in page.text


def changed(folder, tmp_path, **changes):
    """A copy of the sweep with other settings."""
    swept = read_run(folder).swept
    assert swept is not None
    return write(tmp_path / "other", replace(swept.settings, **changes), swept.answers, [])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fingerprint": "beef"}, "is not the model that was measured"),
        ({"model": "mini-lava"}, "Unknown model 'mini-lava'"),
        ({"model": "/no/such"}, "is no directory"),
        ({"model": "someone/large"}, "Say --model someone/large"),
        ({"device": "cpu torch.float3"}, "dtype='float3'"),
    ],
)
def test_why_there_are_none(swept_folder, tmp_path, monkeypatch, changes, said):
    folder = changed(swept_folder, tmp_path, **changes)
    notes, page = page_of(folder, tmp_path, Pictures(), monkeypatch)
    assert any(said in note for note in page.notes)
    assert any(said in note for note in notes)
    assert not [tag for tag, _ in page.tags if tag == "svg"]
    with pytest.raises(ConfigError, match=r"model|dtype"):  # asked for by name
        page_of(folder, tmp_path, Pictures(samples=(3,)), monkeypatch)


def test_a_model_that_has_moved(swept_folder, tmp_path, monkeypatch, model_dir):
    folder = changed(swept_folder, tmp_path, model="/no/such")
    pictures = Pictures(samples=(3,), model=str(model_dir))
    _, page = page_of(folder, tmp_path, pictures, monkeypatch)
    assert [tag for tag, _ in page.tags if tag == "svg"]


def test_a_device_that_is_not_here(swept, model_dir):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    seer = Seer(replace(swept.settings, device="cuda:0 torch.float32"))
    assert seer.device == "cpu"


def test_samples_of_another_version(swept):
    rows = [replace(row, question="what now ?") for row in swept.answers]
    with pytest.raises(ConfigError, match="is not the one that was asked"):
        gallery(replace(swept, answers=rows), [3])
    for task, said in (("chips", "Unknown task 'chips'"), ("lmms:vqa", "lmms-eval's tasks")):
        rows = [replace(row, task=task) for row in swept.answers]
        settings = replace(swept.settings, task=task)
        with pytest.raises(ConfigError, match=said):
            gallery(replace(swept, answers=rows, settings=settings), [])


def test_numbers_that_were_not_asked(swept):
    with pytest.raises(ConfigError, match=r"--samples 6: .* has no answers to it.*below 6"):
        gallery(swept, [0, 6])


@pytest.mark.slow
def test_a_classifier(tmp_path):
    model, inputs = shipped.load("mini-vit")
    settings = settings_of(model, inputs, "mini-vit", task="objects", limit=2, batch_size=2, seed=0)
    (sample,) = VIT_TASKS["mini-vit"]["objects"].load(1, 2)
    rows = [
        Answer("objects", 1, sample.kind, s, b, "", sample.expected, "x", False, 196, kept)
        for s, b, kept in (("evit", "25%", 49.0), ("tome", "reduce=8", 100.0))
    ]
    swept = read_run(write(tmp_path / "run", settings, rows, [])).swept
    assert swept is not None
    found = gallery(swept, [1])
    (drawn,) = found.drawn
    assert found.budgets == ["reduce=8", "25%"]
    (none, evit), (tome, none_too) = (card.overlays for card in drawn.cards)
    assert none is none_too is None
    assert evit is not None
    assert tome is not None
    assert pixels(tome.shade).shape == pixels(evit.shade).shape == (14, 14, 4)
    assert (pixels(tome.shade)[..., 3] == 255).sum() > 8 * 12  # merged patches have one color
