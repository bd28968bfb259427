"""The benchmark of operations: every operation and provider once, and what it must refuse."""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner, Result

from vtprune import kernels
from vtprune.eval import bench_eager
from vtprune.eval import bench_kernels as measuring
from vtprune.eval.bench_kernels import Case, Floor
from vtprune.eval.bench_ops import OPS
from vtprune.eval.bench_results import COLUMNS
from vtprune.eval.cli import app
from vtprune.kernels.topk_sorted import topk_sorted

CPU = torch.device("cpu")
FLOOR = Floor(1e9, dict.fromkeys(measuring.DTYPES, 1e9))
TOPK = Case("topk_sorted", {"B": 2, "N": 64, "K": 8}, "float32")


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "SECONDS", 0.002)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs the command in an empty folder."""
    monkeypatch.chdir(tmp_path)
    given = ("bench", "kernels", "--quick", "--rounds", "1", "--device", "cpu")
    return lambda *args: CliRunner().invoke(app, [*given, *args])


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("dtype", measuring.DTYPES)
def test_every_operation_is_checked_and_timed(
    dtype: str, run: Callable[..., Result], tmp_path: Path
) -> None:
    done = run("--provider", "torch-eager,torch", "--dtype", dtype, "--out", "a/b.csv")
    assert done.exit_code == 0, done.output
    rows = rows_of(tmp_path / "a" / "b.csv")
    assert tuple(rows[0]) == COLUMNS
    assert {(row["op"], row["provider"]) for row in rows} == {
        (op, provider) for op in OPS for provider in ("torch-eager", "torch")
    }
    for row in rows:
        assert row["status"] == "ok", row
        assert float(row["ms_p20"]) <= float(row["ms"]) <= float(row["ms_p80"])
        share = float(row["floor_ms"]) / float(row["ms"])
        assert float(row["share_of_floor"]) == pytest.approx(share) and share > 0
        assert row["time"] and row["device"] and row["torch"] == torch.__version__
        assert row["dtype"] == (OPS[row["op"]].dtype or dtype) and not row["mib"]
    assert done.output.count("| ok |") == 0 and done.output.count(" % |\n") == len(rows)


def test_rows_are_added_to_what_is_there(run: Callable[..., Result], tmp_path: Path) -> None:
    for n in (1, 2):
        assert run("--op", "topk_sorted", "--provider", "torch,triton").exit_code == 0
        rows = rows_of(tmp_path / "kernels.csv")
        assert [row["provider"] for row in rows] == ["torch", "triton"] * n
    assert rows[1]["status"] == "left out: kernels run on GPUs" and not rows[1]["ms"]
    (tmp_path / "kernels.csv").write_text("a,b\n1,2\n")
    done = run("--op", "topk_sorted")
    assert done.exit_code == 2 and "other columns" in done.output
    assert (tmp_path / "kernels.csv").read_text() == "a,b\n1,2\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--op", "topk"), "Unknown operation 'topk'. Did you mean 'topk_sorted'?"),
        (("--provider", "torch,cuda"), "Unknown provider 'cuda'."),
        (("--dtype", "fp8"), "Unknown dtype 'fp8'."),
        (("--device", "gpu"), "device='gpu' cannot be used:"),
        (("--device", "meta"), "device='meta' cannot be timed; give cpu, cuda or xpu."),
        (("--out", "."), "is a folder; give a file"),
        (("--rounds", "0"), "Invalid value"),
    ],
)
def test_what_is_not_known_is_refused(
    given: tuple[str, ...], message: str, run: Callable[..., Result], tmp_path: Path
) -> None:
    done = run(*given)
    assert done.exit_code == 2 and message in done.output
    assert not list(tmp_path.iterdir())


def shifted(scores: Tensor, k: int) -> Tensor:
    return (bench_eager.topk(scores, k) + 1) % scores.shape[1]


def measured(monkeypatch: pytest.MonkeyPatch, **changed: Any) -> dict[str, measuring.Result]:
    """Measures top-k with parts of it replaced."""
    monkeypatch.setitem(OPS, "topk_sorted", replace(OPS["topk_sorted"], **changed))
    results = measuring.measure(TOPK, ("torch-eager", "torch"), CPU, FLOOR, 1)
    return {result.provider: result for result in results}


def test_who_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(monkeypatch, by_hand=shifted)
    assert found["torch-eager"].status.startswith("wrong by ") and not found["torch-eager"].ms
    assert found["torch"].status == "ok" and found["torch"].ms


def test_who_runs_out_of_memory_or_fails_stops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def greedy(scores: Tensor, k: int) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    found = measured(monkeypatch, by_hand=greedy)
    assert found["torch-eager"].status == "out of memory" and found["torch"].ms

    def broken(scores: Tensor, k: int) -> Tensor:
        raise ValueError("no such thing\nat all")

    found = measured(monkeypatch, by_hand=broken)
    assert found["torch-eager"].status == "failed: ValueError: no such thing" and found["torch"].ms
    found = measured(monkeypatch, make=lambda *args: greedy(torch.zeros(1), 1))
    assert {result.status[:14] for result in found.values()} == {"out of memory:"}


def test_a_form_that_is_not_what_its_name_says_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(RuntimeError, match=r"torch-eager of topk_sorted ran .*'torch'\): 2"):
        measured(monkeypatch, by_hand=lambda x, k: (topk_sorted(x, k), topk_sorted(x, k))[0])
    by_hand = bench_eager.topk
    with pytest.raises(RuntimeError, match="torch of topk_sorted ran nothing that is counted"):
        measured(monkeypatch, ours=by_hand, by_hand=by_hand)
    kernels.reset_stats()
    topk_sorted(torch.zeros(1, 3), 1)
    with pytest.raises(RuntimeError, match="triton of topk_sorted ran"):
        measuring.check_ran("topk_sorted", "triton")


def test_the_floor_is_the_longer_of_two_times() -> None:
    floor = Floor(copy=2e9, products={"float32": 1e12})
    assert floor.ms(4e6, 1e9, "float32") == pytest.approx(2.0)
    assert floor.ms(4e6, 5e9, "float32") == pytest.approx(5.0)
    found = measuring.measure_floor(CPU, ("float32",), quick=True)
    assert 1e8 < found.copy < 1e12 and 1e9 < found.products["float32"] < 1e14


def test_bytes_and_flops_are_those_of_the_shape() -> None:
    (result,) = measuring.measure(TOPK, ("torch",), CPU, FLOOR, 1)
    assert (result.n_bytes, result.flops) == (2 * 64 * 4 + 2 * 8 * 8, 0)
    shape = {"B": 2, "N": 32, "H": 4, "d": 16}
    (result,) = measuring.measure(
        Case("attn_received", shape, "float16"), ("torch",), CPU, FLOOR, 1
    )
    assert result.n_bytes == 2 * (2 * 4 * 32 * 16) * 2 + 2 * 32 * 4
    assert result.flops == 2 * 4 * 32 * 32 * 16 * 2


def test_gpus_tell_memory_and_times(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Memory:
        """4 MiB are held, and each call allocates 3 more, which go before it ends."""

        synchronize = reset_peak_memory_stats = staticmethod(lambda device: None)
        memory_allocated = staticmethod(lambda device: 4 << 20)
        max_memory_allocated = staticmethod(lambda device: (4 << 20) + (3 << 20) * (len(made) > 1))

    class Testing:
        @staticmethod
        def do_bench(call: Callable[[], Any], *, return_mode: str, **options: Any) -> list[float]:
            call()
            return [1.0, 3.0] if return_mode == "all" else []

    monkeypatch.setattr(torch, "get_device_module", lambda device: Memory)
    monkeypatch.setattr(measuring, "need", lambda module, extra: Testing)
    device = torch.device("cuda")
    assert measuring.peak(lambda: made.append(1), device) == (None, 3.0)  # of the second call
    assert measuring.timed(lambda: made.append(1), device) == [1.0, 3.0] and len(made) == 3
    assert measuring.left_out(TOPK, "triton", device) is None


@pytest.mark.slow
def test_the_script_compiles_the_form_in_torch(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "bench_kernels.py"
    few = ["--quick", "--rounds", "1", "--op", "row_pair_stats,greedy_select", "--device", "cpu"]
    done = subprocess.run(
        [sys.executable, str(script), *few], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = {(row["op"], row["provider"]): row for row in rows_of(tmp_path / "kernels.csv")}
    assert rows["row_pair_stats", "torch-compile"]["status"] == "ok"
    assert "unrolled" in rows["greedy_select", "torch-compile"]["status"]
