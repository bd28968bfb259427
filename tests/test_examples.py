"""The examples run as a reader would run them, without a network; so does code in the docs."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import vtprune
import vtprune.strategies
from vtprune.eval import tiny
from vtprune.types import Signals

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("[!_]*.py"))
FAMILIES = [
    *("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")
]
Example = Callable[..., str]


def run(script: Path, cwd: Path, *args: str) -> str:
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    result = subprocess.run(
        [sys.executable, str(script), *args],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": paths},
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Example:
    """Runs an example in this process; returns what it printed."""

    def call(name: str, *args: str | Path) -> str:
        quick = ["--repeats", "1", "--new-tokens", "2", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *quick, *map(str, args)])
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(ROOT / "examples")
    return call


def table(out: str) -> dict[str, int]:
    """Returns the visual tokens of each row of the table of costs."""
    cost = r"^(\S.*?)  +(\d+)  +[\d.]+  +[\d.]+  +[\d.]+$"
    return {label: int(n) for label, n in re.findall(cost, out, re.MULTILINE)}


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.linear_gradient("L").resize((120, 90)).save(path)
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[[str], Path]:
    """Saves the tiny model of a family as a checkpoint in a directory."""

    def save(family: str) -> Path:
        for part in tiny.build(family):
            part.save_pretrained(tmp_path / family)
        return tmp_path / family

    return save


def movie(folder: Path, n: int = 11) -> list[Image.Image]:
    """Saves frames of growing brightness under names that do not sort as text; returns them."""
    folder.mkdir()
    frames = [Image.new("RGB", (56, 42), (20 * i, 0, 0)) for i in range(n)]
    for i, frame in enumerate(frames):
        frame.save(folder / f"{i}.png")
    return frames


@pytest.mark.parametrize("name", [*FAMILIES, "video"])
def test_family_example_prunes_the_tiny_model(example: Example, name: str) -> None:
    out = example(name, "--tiny")
    rows = table(out)
    before = rows.pop("unpruned")
    assert rows and all(0 < after < before for after in rows.values())
    assert "after a warm-up" in out and "its times say nothing" in out


@pytest.mark.parametrize("name", FAMILIES)
def test_family_example_takes_a_directory_and_a_photo(
    example: Example, name: str, checkpoint: Callable[[str], Path], photo: Path
) -> None:
    given = ["--model", checkpoint(name), "--strategy", "random", "--keep", "3"]
    out = example(name, photo, "Is it green?", *given)
    rows = table(out)
    before = rows.pop("unpruned")
    assert rows and all(3 <= after < before for after in rows.values())
    assert "question: Is it green?\n" in out
    fixed = name in ("llava_next", "llava_onevision")  # newlines come on top
    assert fixed or re.search(r" 3 of \d+ visual tokens", out)


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llava_onevision", "gif"),
        ("qwen2_5_vl", "folder"),
        ("qwen3_vl", "gif"),
        ("internvl", "gif"),
    ],
)
def test_video_example_takes_any_family_and_kind_of_video(
    example: Example, family: str, kind: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "frames"
    first, *rest = movie(path)
    if kind == "gif":
        path = tmp_path / "movie.gif"
        first.save(path, save_all=True, append_images=rest, duration=500)
    out = example("video", path, "--model", checkpoint(family), "--frames", "4", "--keep", "0.5")
    rows = table(out)
    counts = re.findall(r"^steps?.*: +([\d ]+) of (\d+)$", out, re.MULTILINE)
    kept = [int(n) for line, _ in counts for n in line.split()]
    n_steps = 2 if family.startswith("qwen") else 4
    newline = family == "llava_onevision"
    assert len(kept) == n_steps and sum(kept) + newline == rows["divprune"]
    assert int(counts[0][1]) * n_steps + newline == rows["unpruned"]


def test_video_example_spreads_frames_in_the_order_of_numbers(tmp_path: Path) -> None:
    common = runpy.run_path(str(ROOT / "examples" / "_common.py"))
    parser = common["command_line"]("", model="m", strategy="s", keep="1", media="video")
    first, *rest = movie(tmp_path / "frames")
    gif = tmp_path / "movie.gif"
    first.save(gif, save_all=True, append_images=rest, duration=250)
    for path, fps in ((tmp_path / "frames", 2.0), (gif, 4.0)):
        args = parser.parse_args([str(path)])
        args.frames, args.fps = 3, 2.0
        frames, settings = common["video"](args)
        assert frames.shape == (3, 42, 56, 3)
        assert np.abs(frames[:, 0, 0, 0].astype(int) - [0, 100, 200]).max() <= 8
        clock = {"total_num_frames": 11, "fps": fps, "frames_indices": [0, 5, 10]}
        assert settings["video_metadata"] == [clock]


@pytest.mark.parametrize(
    ("name", "args", "message"),
    [
        ("llava_next", [], "give a file, or --tiny"),
        ("llava_next", ["nowhere.png"], "there is no file nowhere.png"),
        ("llava_next", ["text.txt"], "text.txt is no image"),
        ("llava_next", ["photo.png", "--model", "./nowhere"], "'./nowhere' is no directory"),
        ("llava_next", ["--tiny", "--keep", "many"], "Budget 'many' is not understood"),
        ("llava_next", ["--tiny", "--repeats", "0"], "must be at least 1"),
        ("llava", ["photo.png", "--tiny", "--keep", "37"], "an image has 36 tokens"),
        ("qwen2_5_vl", ["--tiny", "--layer", "0"], r"blocks \[1, 3\] with attention over"),
        ("video", ["text.txt", "--tiny"], "holds no frames .*ffmpeg"),
        ("video", ["photo.png", "--tiny"], "gives 1 frames; a video needs 2"),
        ("video", [".", "--tiny"], "gives 1 frames; a video needs 2"),
    ],
)
def test_example_says_what_is_wrong(
    example: Example,
    photo: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    args: list[str],
    message: str,
) -> None:
    photo.with_name("text.txt").write_text("no pixels")
    with pytest.raises(SystemExit) as stopped:
        example(name, *args)
    assert re.search(message, f"{stopped.value} {capsys.readouterr().err}")


def test_llava_example_answers_right_with_a_quarter_of_the_tokens(tmp_path: Path) -> None:
    out = run(ROOT / "examples" / "llava.py", tmp_path, "--tiny", "--repeats", "1")
    assert "\nunpruned: 9\nfastervlm: 9\n" in out
    assert "64 of 256 visual tokens, 25.0 %" in out
    kept = re.findall(r"^[#.]{16}$", out, re.MULTILINE)
    assert len(kept) == 16 and "".join(kept).count("#") == 64


@pytest.mark.slow
def test_compare_strategies_counts_and_says_what_was_lost(tmp_path: Path) -> None:
    few = ["--strategies", "random", "fastervlm", "--keep", "4", "--scenes", "14"]
    out = run(ROOT / "examples" / "compare_strategies.py", tmp_path, *few)
    right = [int(n) for n in re.findall(r"^\S+:? .*?(\d+) of 14$", out, re.MULTILINE)]
    lost = out.count(" -> ")
    assert len(right) == 3
    assert "random, 4 of 256 tokens" in out
    assert 2 * right[0] - right[1] - right[2] <= lost  # gained answers make up the rest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "library", "said"),
    [
        ("vit_timm", "timm", "tome: 14 of 14 right"),
        ("vit_open_clip", "open_clip", "tome: 14 of 14 pictures find their caption"),
    ],
)
def test_vit_example_runs_on_the_shipped_model(
    tmp_path: Path, name: str, library: str, said: str
) -> None:
    pytest.importorskip(library)
    few = ["--batch", "14", "--repeats", "1"]
    out = run(ROOT / "examples" / f"{name}.py", tmp_path, *few)
    assert said in out and said.replace("tome", "unpruned") in out
    assert "49 of 196 patches are left" in out
    assert "GFLOPs of the blocks per image: 0.352 of 0.615" in out


@pytest.mark.slow
def test_vit_example_takes_a_name_of_timm(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    given = ["--model", "vit_tiny_patch16_224", "--strategy", "strided", "--keep", "9"]
    few = ["--batch", "2", "--repeats", "1"]
    out = run(ROOT / "examples" / "vit_timm.py", tmp_path, *given, *few)
    assert "9 of 196 patches are left" in out and "strided: [2, 1000]" in out


@pytest.mark.slow
def test_vit_benchmark_prints_every_call(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    small = ["--model", "vit_tiny_patch16_224", "--batch", "2", "--rounds", "1"]
    script = ROOT / "benchmarks" / "vit.py"
    names = ["tome", "strided", "prumerge", "fastv", "dynamicvit", "sparsifiner"]
    out = run(script, tmp_path, *small, "--strategies", *names)
    rows = re.findall(r"^\| ([\w .()=]+) \| ([\d.]+) \| ([\d.]+) \|", out, re.MULTILINE)
    fitting = ["tome", "strided", "dynamicvit", "sparsifiner"]
    assert [row[0] for row in rows] == ["unpruned", *fitting, "tome r=13", "tome r=16"]
    whole, *halves = (float(row[1]) for row in rows[:4])
    assert all(0.45 * whole < half <= 0.5 * whole + 0.01 for half in halves)
    assert rows[4][2] == "100.0"  # sparsifiner masks what it computed
    assert "tome r=13: 197, 184, 171, " in out and ", 53, 37, 21\n" in out
    assert "prumerge left out: it acts on what leaves the last block" in out
    assert "fastv left out: " in out


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_examples_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60


@pytest.mark.slow
def test_prefill_benchmark_prints_every_call(tmp_path: Path) -> None:
    small = ["--rounds", "1", "--blocks", "2", "--layers", "1", "--width", "64", "--keep", "16"]
    script = ROOT / "benchmarks" / "prefill.py"
    out = run(script, tmp_path, *small, "--strategies", "fastervlm", "visionzip")
    rows = re.findall(r"^\| (\w+) \| \d+ \| \d+ - \d+ \| ([\d.]+) \| ([\d.]+) \|$", out, re.M)
    assert [row[0] for row in rows] == ["unpruned", "free", "fastervlm", "visionzip"]
    assert rows[0][1] == rows[1][2] == "1.000"
    assert "576 visual tokens" in out
    costs = re.findall(
        r"^\| (\w+) \|(?: -?[\d.]+ \|){3} (\d+) \| ([\d.]+) \| ([\d.]+) \|$", out, re.M
    )
    assert [row[:2] for row in costs] == [
        ("unpruned", "576"),
        ("fastervlm", "16"),
        ("visionzip", "16"),
    ]
    assert costs[0][2] == "100.0"
    # 48 of 608 columns: keys and values of one layer, 64 wide, float32.
    assert float(costs[1][3]) == round(2 * 48 * 64 * 4 / 2**20, 2)


@pytest.mark.slow
def test_what_is_kept_follows_things_and_counts(tmp_path: Path) -> None:
    few = ["--limit", "20", "--strategy", "random", "todre"]
    out = run(ROOT / "benchmarks" / "what_is_kept.py", tmp_path, *few)
    on_things = dict(re.findall(r"^\| `(\w+)` \| (\d+) \|", out, re.MULTILINE))
    assert int(on_things["todre"]) > 2 * int(on_things["random"]) > 0
    counted = dict(
        re.findall(r"^\| ([\w %]+) \| ([\d.]+) \| [\d.]+ \| [\d.]+ \|$", out, re.MULTILINE)
    )
    assert len(counted) == 9
    assert float(counted["0 %"]) < float(counted["all tokens"]) < float(counted["80 %"])


def test_documented_strategy_works_as_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "adding_a_strategy.md").read_text(encoding="utf-8")
    code = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[0]
    (tmp_path / "largest_norm.py").write_text(code, encoding="utf-8")
    path = [*vtprune.strategies.__path__, str(tmp_path)]
    monkeypatch.setattr(vtprune.strategies, "__path__", path)
    tokens = torch.tensor([[[1.0, 1.0], [3.0, 0.0], [2.0, 2.0]]])
    try:
        for order, kept in ((1.0, 2), (100.0, 1)):
            chosen = vtprune.select("largest_norm", keep=1, order=order, signals=Signals(tokens))
            assert chosen.rows.tolist() == [[kept]]
        with pytest.raises(vtprune.ConfigError, match="above 0"):
            vtprune.select("largest_norm", keep=1, order=0.0, signals=Signals(tokens))
    finally:
        sys.modules.pop("vtprune.strategies.largest_norm", None)
