from __future__ import annotations

import pytest
from PIL import Image
from rich.console import Console

import vtprune
from vtprune import ConfigError, UnsupportedError
from vtprune.eval import shipped
from vtprune.eval.budgets import CEILING, FLOOR, Point, points
from vtprune.eval.output import write_output
from vtprune.eval.results import Folder
from vtprune.eval.samples import TASKS, Asker, answer_of
from vtprune.eval.sweep import Sweep, seeded, settings_of
from vtprune.flops import Shape
from vtprune.registry import build

TASK, LIMIT, SIZE = "scenes", 5, 3
POINTS = points(["random", "visionzip"], ["25%", "1"])


@pytest.fixture(scope="module")
def settings(loaded):
    model, processor = loaded
    return settings_of(
        model, processor, "untrained", task=TASK, limit=LIMIT, batch_size=SIZE, seed=0
    )


@pytest.fixture(scope="module")
def run(loaded, settings):
    model, processor = loaded
    return Sweep(model, processor, POINTS, settings)


@pytest.fixture(scope="module")
def whole(run, settings, tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = Folder(tmp_path_factory.mktemp("whole"), settings)
    steps = []
    run.run(folder, steps.append)
    assert sum(steps) == LIMIT * len(POINTS)
    folder.close()
    return folder


def test_one_row_per_sample_and_point(whole):
    found = [(row.point, row.sample) for row in whole.answers.rows]
    assert len(set(found)) == len(found) == LIMIT * len(POINTS)
    assert {point for point, _ in found} == set(POINTS)
    samples = TASKS[TASK].load(0, LIMIT)
    for row in whole.answers.rows:
        sample = samples[row.sample]
        asked = (sample.task, sample.kind, sample.question, sample.expected)
        assert (row.task, row.kind, row.question, row.expected) == asked
        assert row.right == (row.answer == row.expected)


def test_counts_are_those_of_the_handle(whole):
    kept = {row.point: (row.tokens, row.kept) for row in whole.answers.rows}
    assert kept[CEILING] == (256, 256)
    assert kept[FLOOR] == (0, 0)
    assert kept[Point("random", "25%")] == kept[Point("visionzip", "25%")] == (256, 64)
    assert kept[Point("visionzip", "1")] == (256, 1)


def test_shares_of_flops_are_those_of_the_prompts(whole, loaded):
    model, processor = loaded
    shape = Shape.of(model.config.text_config)
    rows = {(row.point, row.sample): row.flops for row in whole.answers.rows}
    for sample in TASKS[TASK].load(0, LIMIT):
        ask = Asker(processor)
        tokens, words = (
            ask([sample.question], images)["input_ids"].shape[1]
            for images in ([sample.image], None)
        )

        def share(n, of=tokens):
            return shape.prefill([n] * shape.layers) / shape.prefill([of] * shape.layers)

        assert rows[CEILING, sample.index] == 1
        assert rows[FLOOR, sample.index] == pytest.approx(share(words), abs=1e-5)
        for name, budget, kept in (("random", "25%", 64), ("visionzip", "1", 1)):
            wanted = share(tokens - 256 + kept)
            assert rows[Point(name, budget), sample.index] == pytest.approx(wanted, abs=1e-5)


def test_a_model_of_unknown_layers_is_swept_without_shares(loaded, settings, tmp_path, monkeypatch):
    model, processor = loaded
    monkeypatch.setattr("vtprune.flops.GATED", frozenset())
    folder = Folder(tmp_path, settings)
    Sweep(model, processor, points(["strided"], ["25%"]), settings).run(folder)
    shares = {row.point: row.flops for row in folder.answers.rows}
    assert shares == {CEILING: 1.0, FLOOR: None, Point("strided", "25%"): None}
    write_output(folder, list(shares), Console(quiet=True))
    assert "| strided | 25% |" in (tmp_path / "table.md").read_text()
    with Image.open(tmp_path / "accuracy.png") as picture:
        assert picture.size[0] < 1500


def answer(processor, ids):
    return answer_of(processor.batch_decode(ids[:, -5:], skip_special_tokens=True)[0])


def test_answers_are_those_of_the_model_alone(whole, loaded):
    model, processor = loaded
    ask = Asker(processor)
    rows = {(row.point, row.sample): row.answer for row in whole.answers.rows}
    for sample in TASKS[TASK].load(0, LIMIT):
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
        seeing = ask([sample.question], [sample.image])
        ids = model.generate(**seeing, **options)
        assert rows[CEILING, sample.index] == answer(processor, ids)
        with vtprune.wrap(model, "visionzip", keep=0.25):
            ids = model.generate(**seeing, **options)
        assert rows[Point("visionzip", "25%"), sample.index] == answer(processor, ids)
        blind = ask([sample.question], None)
        assert "pixel_values" not in blind
        assert model.config.image_token_id not in blind["input_ids"]
        ids = model.generate(**blind, **options)
        assert rows[FLOOR, sample.index] == answer(processor, ids)


def test_prompts_of_different_length_are_padded_left(loaded):
    inputs = Asker(loaded[1])(["how many digits ?", "what is just left of the red one ?"], None)
    assert inputs["attention_mask"][0, 0] == 0
    assert bool(inputs["attention_mask"][:, -1].all())


def test_times_are_per_batch(whole):
    assert len(whole.timings.rows) == 2 * len(POINTS)
    assert {(row.first, row.size) for row in whole.timings.rows} == {(0, 3), (3, 2)}
    assert all(row.ms > 0 for row in whole.timings.rows)


@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 0.72, 0.999])
def test_a_cut_file_is_completed_to_the_same_bytes(whole, run, settings, tmp_path, share):
    data = (whole.path / "results.jsonl").read_bytes()
    Folder(tmp_path, settings)
    (tmp_path / "results.jsonl").write_bytes(data[: int(share * len(data))])
    folder = Folder(tmp_path, settings)
    steps = []
    run.run(folder, steps.append)
    assert (tmp_path / "results.jsonl").read_bytes() == data
    assert sum(steps) == LIMIT * len(POINTS)


def test_a_lost_time_is_measured_again_without_doubling_answers(whole, run, settings, tmp_path):
    Folder(tmp_path, settings)
    for name in ("results.jsonl", "timings.jsonl"):
        (tmp_path / name).write_bytes((whole.path / name).read_bytes())
    lines = (tmp_path / "timings.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "timings.jsonl").write_bytes(b"".join(lines[:-2]))
    folder = Folder(tmp_path, settings)
    run.run(folder)
    assert (tmp_path / "results.jsonl").read_bytes() == (whole.path / "results.jsonl").read_bytes()
    assert folder.timed() == whole.timed()
    assert len(folder.timings.rows) == len(lines)


def test_a_finished_run_computes_nothing(whole, run, settings, monkeypatch):
    monkeypatch.setattr(Sweep, "measure", lambda *_: pytest.fail("measured again"))
    before = (whole.path / "results.jsonl").read_bytes()
    run.run(Folder(whole.path, settings))
    assert (whole.path / "results.jsonl").read_bytes() == before


def test_an_added_strategy_leaves_the_rest(whole, loaded, settings, tmp_path):
    data = (whole.path / "results.jsonl").read_bytes()
    Folder(tmp_path, settings)
    (tmp_path / "results.jsonl").write_bytes(data)
    model, processor = loaded
    more = Sweep(model, processor, points(["strided"], ["25%"]), settings)
    folder = Folder(tmp_path, settings)
    more.run(folder)
    lines = (tmp_path / "results.jsonl").read_bytes().splitlines(keepends=True)
    added = [row for row in folder.answers.rows if row.point.strategy == "strided"]
    assert len(added) == LIMIT
    assert b"".join(line for line in lines if b'"strided"' not in line) != data  # asked first
    assert sorted(line for line in lines if b'"strided"' not in line) == sorted(
        data.splitlines(keepends=True)
    )
    asked = [row.point in more.points for row in folder.answers.rows]
    assert asked == sorted(asked, reverse=True)
    alone = Folder(tmp_path / "alone", settings)
    more.run(alone)
    assert folder.answers.rows[: sum(asked)] == alone.answers.rows


def test_tasks_are_kept_apart(loaded, tmp_path):
    model, processor = loaded
    both = "scenes-easy,scenes-count"
    settings = settings_of(model, processor, "untrained", task=both, limit=2, batch_size=2, seed=0)
    folder = Folder(tmp_path, settings)
    Sweep(model, processor, points(["strided"], ["25%"]), settings).run(folder)
    found = [(row.task, row.sample, row.point.strategy) for row in folder.answers.rows]
    assert len(set(found)) == len(found) == 2 * 2 * 3
    kinds = {row.kind for row in folder.answers.rows if row.task == "scenes-count"}
    assert kinds == {"count"}
    easy = [row.question for row in folder.answers.rows if row.task == "scenes-easy"]
    assert easy[:2] == [sample.question for sample in TASKS["scenes-easy"].load(0, 2)]


@pytest.mark.parametrize(
    ("text", "answer"),
    [("3 7 1", "371"), (" Yes, it is", "yes"), ("", ""), ("**Red**.", "red"), ("4 cats", "4")],
)
def test_answers_are_read(text, answer):
    assert answer_of(text) == answer


def test_what_reduces_videos_is_refused_where_there_are_none(settings):
    model, processor = shipped.load("mini-qwen")
    with pytest.raises(UnsupportedError, match="evs reduces videos, but scenes has images alone"):
        Sweep(model, processor, [Point("evs", "25%")], settings)


def test_what_is_refused_is_left_out_when_asked(loaded, settings, tmp_path):
    model, processor = loaded
    both = points(["pyramiddrop", "fastv"], ["60%", "6.25%"])
    with pytest.raises(ConfigError, match="out of reach of pyramiddrop"):
        Sweep(model, processor, both, settings)
    run = Sweep(model, processor, both, settings, lenient=True)
    assert list(run.refused) == [Point("pyramiddrop", "6.25%")]
    assert len(run.points) == len(both) - 1
    folder = Folder(tmp_path, settings)
    run.run(folder)
    kept = {row.point: row.kept for row in folder.answers.rows}
    assert kept[Point("fastv", "6.25%")] == round((256 + 11 * 16) / 12, 2)
    assert abs(kept[Point("pyramiddrop", "60%")] - 0.6 * 256) < 2


def test_random_draws_anew_for_each_batch_and_seed():
    assert len({seeded("random", *pair) for pair in ((0, 0), (0, 16), (1, 0))}) == 3
    assert seeded("random", 1, 0) == seeded("random", 1, 0)
    assert seeded("random(seed=5)", 1, 0) == build("random", seed=5)
    assert seeded("strided", 0, 0) == seeded("strided", 1, 16)


def count_hooks(model):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]


def test_the_model_is_left_as_it_was(loaded, settings):
    model, processor = loaded
    before, hooks_before = dict(vars(model)), count_hooks(model)
    with pytest.raises(ConfigError, match="700"):
        Sweep(model, processor, points(["random"], ["25%", "700"]), settings)
    assert vars(model) == before
    assert count_hooks(model) == hooks_before


def test_a_processor_without_template_is_refused(loaded, settings, monkeypatch):
    model, processor = loaded
    monkeypatch.setattr(processor, "chat_template", None)
    with pytest.raises(ConfigError, match="no chat template"):
        Sweep(model, processor, POINTS, settings)
