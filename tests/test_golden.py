"""Every recorded case of the authors' code, and proof that the harness can fail."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.golden_harness import (
    Adapter,
    Case,
    GoldenError,
    Output,
    Tensors,
    check,
    find_adapter,
    find_cases,
)

SHIPPED = Path(__file__).parent / "golden"


def test_case(golden_case: Case, record_property: Callable[[str, object], None]) -> None:
    record_property("golden", golden_case.method)
    check(golden_case, find_adapter(golden_case.method))


def test_the_shipped_cases_are_complete() -> None:
    methods = [case.method for case in find_cases(SHIPPED)]
    assert {"fastervlm", "vtc_cls", "divprune", "visionzip"} <= set(methods)
    assert all(callable(find_adapter(method)) for method in methods)


def write_case(folder: Path, method: str = "toy", **tensors: Tensor) -> Case:
    """Writes a case whose tensors ``in_x`` and ``out_keep`` are named ``in.x``, ``out.keep``."""
    named = {name.replace("_", ".", 1): value for name, value in tensors.items()}
    meta = {"method": method, "params": {"k": 2}, "tensors": dict.fromkeys(named, "meaning")}
    folder.mkdir(exist_ok=True)
    (folder / "c1.json").write_text(json.dumps(meta))
    save_file(named, folder / "c1.safetensors")
    return find_cases(folder)[0]


@pytest.fixture
def toy(tmp_path: Path) -> Case:
    """The two largest of ``in.x`` and their values."""
    x = torch.tensor([[0.1, 0.4, 0.3, 0.2]])
    keep = torch.tensor([[1, 2]])
    return write_case(tmp_path / "toy", in_x=x, out_keep=keep, out_tokens=x.gather(1, keep))


def largest(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
    x = tensors["in.x"]
    keep = x.topk(params["k"]).indices.sort().values
    return {"out.keep": keep, "out.tokens": x.gather(1, keep)}


def answers(**changed: Output | None) -> Adapter:
    """``largest`` with some outputs replaced, or left out where None."""

    def adapter(params: dict[str, Any], tensors: Tensors) -> Mapping[str, Output]:
        named = {f"out.{name}": value for name, value in changed.items()}
        merged = {**largest(params, tensors), **named}
        return {name: value for name, value in merged.items() if value is not None}

    return adapter


def test_a_right_answer_passes(toy: Case) -> None:
    check(toy, largest)
    check(toy, answers(tokens=torch.tensor([[0.4 * (1 + 5e-5), 0.3]])))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"keep": torch.tensor([[1, 3]])},
            r"out.keep differs in 1 of 2 .* \(0, 1\): 3, recorded 2",
        ),
        ({"keep": torch.tensor([[1.0, 2.0]])}, "out.keep is .*float32, recorded .*int64"),
        ({"keep": torch.tensor([[1, 2, 3]])}, r"out.keep is \[1, 3\]"),
        ({"tokens": torch.tensor([[0.4 * (1 + 5e-4), 0.3]])}, "out.tokens differs in 1 of 2"),
        ({"tokens": torch.tensor([[0.4, float("nan")]])}, "out.tokens differs in 1 of 2"),
        ({"tokens": (torch.ones(1), torch.zeros(1))}, "out.tokens differs in 1 of 1"),
        ({"tokens": None}, "out.tokens was not checked"),
        ({"scores": torch.ones(1)}, "out.scores is not in the case"),
    ],
)
def test_a_wrong_answer_fails(toy: Case, changed: dict[str, Output], message: str) -> None:
    with pytest.raises(GoldenError, match=message):
        check(toy, answers(**changed))


def test_a_small_score_is_compared_by_its_size(tmp_path: Path) -> None:
    recorded = torch.tensor([1e-6, 2e-6])
    case = write_case(tmp_path, out_scores=recorded)
    with pytest.raises(GoldenError, match="differs in 2 of 2"):
        check(case, lambda params, tensors: {"out.scores": recorded * 1.01})


def test_an_unread_input_fails_unless_ignored_with_a_reason(tmp_path: Path) -> None:
    case = write_case(tmp_path, in_x=torch.ones(1, 3), in_y=torch.ones(1), out_keep=torch.ones(1))

    def adapter(ignored: Callable[[Tensors], None]) -> Adapter:
        def from_golden(params: dict[str, Any], tensors: Tensors) -> dict[str, Output]:
            assert "in.y" in tensors
            ignored(tensors)
            return {"out.keep": tensors["in.x"][0, :1]}

        return from_golden

    with pytest.raises(GoldenError, match=r"in\.y was neither read nor ignored"):
        check(case, adapter(lambda tensors: None))
    with pytest.raises(GoldenError, match="needs a reason"):
        check(case, adapter(lambda tensors: tensors.ignore("in.y", " ")))
    with pytest.raises(GoldenError, match="no such input"):
        check(case, adapter(lambda tensors: tensors.ignore("in.z", "unused")))
    check(case, adapter(lambda tensors: tensors.ignore("in.y", "the method has no use for it")))


def test_a_method_needs_an_adapter() -> None:
    with pytest.raises(GoldenError, match=r"'unheard_of' has no adapter: write .*unheard_of\.py"):
        find_adapter("unheard_of")
    with pytest.raises(GoldenError, match="no adapter"):
        find_adapter("../fastervlm")


def test_incomplete_folders_are_errors(tmp_path: Path, toy: Case) -> None:
    with pytest.raises(GoldenError, match="no such folder"):
        find_cases(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(GoldenError, match="no case in it"):
        find_cases(tmp_path / "empty")
    (toy.path.parent / "notes.json").write_text("{}")
    assert len(find_cases(toy.path.parent)) == 1
    toy.path.write_text("{")
    with pytest.raises(GoldenError, match="not valid json"):
        find_cases(toy.path.parent)
    toy.path.write_text("{}")
    with pytest.raises(GoldenError, match="names no method"):
        find_cases(toy.path.parent)
    toy.path.unlink()
    with pytest.raises(GoldenError, match="no json beside it"):
        find_cases(toy.path.parent)


def test_a_case_must_hold_the_tensors_that_it_declares(toy: Case) -> None:
    path = toy.path.with_suffix(".safetensors")
    save_file({"in.x": torch.ones(1, 4)}, path)
    with pytest.raises(GoldenError, match=r"disagree on: out\.keep, out\.tokens"):
        check(toy, largest)
    path.unlink()
    with pytest.raises(GoldenError, match="is missing"):
        check(toy, largest)


@pytest.mark.parametrize(
    "name",
    [
        *("fastervlm", "vtc_cls", "divprune", "visionzip"),
        *("vispruner", "todre", "prumerge"),
    ],
)
def test_each_output_of_a_shipped_case_is_really_compared(name: str, tmp_path: Path) -> None:
    source = find_cases(SHIPPED / name)[-1]
    adapter = find_adapter(name)
    assert not isinstance(adapter, str)
    recorded = load_file(source.path.with_suffix(".safetensors"))
    shutil.copy(source.path, tmp_path)
    for key in (key for key in recorded if key.startswith("out.")):
        tampered = {k: v.clone() for k, v in recorded.items()}
        tampered[key].view(-1)[-1] += 1
        save_file(tampered, tmp_path / f"{source.path.stem}.safetensors")
        with pytest.raises(GoldenError, match=f"{key} differs"):
            check(find_cases(tmp_path)[0], adapter)


def run_suite(*folders: Path) -> subprocess.CompletedProcess[str]:
    """Runs the recorded cases in a process of their own."""
    options = [f"--golden={folder}" for folder in folders]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        *options,
        "-k",
        "test_case",
    ]
    root = Path(__file__).parents[1]
    return subprocess.run(
        [*command, str(Path(__file__))], cwd=root, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_the_option_runs_counts_and_fails(tmp_path: Path, toy: Case) -> None:
    shutil.copytree(SHIPPED / "vtc_cls", tmp_path / "more")
    shipped, more = len(find_cases(SHIPPED)), len(find_cases(tmp_path / "more"))
    result = run_suite(tmp_path / "more")
    assert result.returncode == 0, result.stdout
    assert f"golden cases run: {shipped + more}\n" in result.stdout
    result = run_suite(toy.path.parent)
    assert result.returncode == 1
    assert "'toy' has no adapter" in result.stdout
    assert f"golden cases run: {shipped + 1}\n" in result.stdout


def test_the_option_refuses_a_folder_without_cases(tmp_path: Path) -> None:
    result = run_suite(tmp_path / "absent")
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "no such folder" in result.stderr
