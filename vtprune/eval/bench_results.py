"""What a benchmark of operations prints, and the file that it adds its rows to."""

from __future__ import annotations

import csv
import platform
import subprocess
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import vtprune
from vtprune.errors import ConfigError
from vtprune.eval.bench_kernels import Floor, Result, on_gpu

HEADER = (
    "| operation | size | dtype | provider | ms, median | 20 % - 80 % | MiB | of the floor |\n"
    "|---|---|---|---|---:|---:|---:|---:|"
)
CAPTION = (
    "The floor is what a copy, or matrix products in that dtype, of as many bytes and FLOPs take; "
    "small inputs that stay in a cache can beat it. MiB is what a call allocates at most, on GPUs."
)


@dataclass(frozen=True)
class Conditions:
    """What a figure means nothing without."""

    time: str
    device: str
    vtprune: str
    commit: str
    torch: str
    triton: str
    python: str
    copy_gb_s: str
    tflop_s: str  # by dtype

    @classmethod
    def of(cls, device: torch.device, floor: Floor) -> Conditions:
        """Returns those of now and here."""
        rates = [f"{dtype} {floor.products[dtype] / 1e12:.4g}" for dtype in floor.products]
        return cls(
            time=datetime.now(UTC).isoformat(timespec="seconds"),
            device=name_of(device),
            vtprune=vtprune.__version__,
            commit=commit(),
            torch=torch.__version__,
            triton=_triton(),
            python=platform.python_version(),
            copy_gb_s=f"{floor.copy / 1e9:.4g}",
            tflop_s=", ".join(rates),
        )

    def __str__(self) -> str:
        return (
            f"{self.device}; vtprune {self.vtprune} ({self.commit or 'no commit'}), torch "
            f"{self.torch}, triton {self.triton or 'none'}, Python {self.python}\n"
            f"measured first: copy {self.copy_gb_s} GB/s, products in TFLOP/s: {self.tflop_s}"
        )


def name_of(device: torch.device) -> str:
    """Returns what the device is called; of a CPU with its threads."""
    if on_gpu(device):
        return torch.get_device_module(device).get_device_name(device)
    return f"{_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    """Returns the name of the processor, where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    """Returns the commit of a clone, with a + where files differ from it; empty if installed."""
    root = Path(vtprune.__file__).parents[1]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return ""


COLUMNS = (
    *(field.name for field in fields(Conditions)),
    *("op", "size", "dtype", "provider", "status", "error", "ms", "ms_p20", "ms_p80", "mib"),
    *("bytes", "flops", "floor_ms", "share_of_floor"),
)


def line(result: Result) -> str:
    """Returns a row of the table."""
    case, times = result.case, [result.status, "", "", ""]
    if result.ms and result.share is not None:
        middle, low, high = result.ms
        memory = "" if result.mib is None else f"{result.mib:.1f}"
        times = [f"{middle:.4g}", f"{low:.4g} - {high:.4g}", memory, f"{100 * result.share:.0f} %"]
    return f"| {' | '.join([case.op, case.size, case.dtype, result.provider, *times])} |"


def row(result: Result, conditions: Conditions) -> list[object]:
    """Returns a row of the file, one entry for each of ``COLUMNS``."""
    case, times = result.case, result.ms or ("", "", "")
    what = [case.op, case.size, case.dtype, result.provider, result.status, result.error]
    work = [result.mib, result.n_bytes, result.flops, result.floor_ms, result.share]
    return [*astuple(conditions), *what, *times, *work]


def check_file(file: Path) -> None:
    """Raises ConfigError where rows cannot be added to a file."""
    if file.is_dir():
        raise ConfigError(f"{file} is a folder; give a file, such as {file / 'kernels.csv'}.")
    if file.exists() and file.stat().st_size:
        with file.open(encoding="utf-8", newline="") as stream:
            found = next(csv.reader(stream))
        if tuple(found) != COLUMNS:
            raise ConfigError(f"{file} has other columns; give another file as --out.")


def append(file: Path, rows: list[list[object]]) -> None:
    """Adds rows to a CSV file; what it holds stays."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        if not stream.tell():
            writer.writerow(COLUMNS)
        writer.writerows(rows)
