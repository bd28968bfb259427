"""Devices, backends and shipped models, tried out one by one.

A probe imports what it looks at, returns a note about it, and raises whatever is wrong with it:
that becomes the finding, so a broken package is reported and stops nothing.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Finding:
    """One thing that was tried; ``note`` says what it is, or why it does not work."""

    name: str
    works: bool
    note: str


def devices() -> tuple[Finding, ...]:
    """Returns the CPU and every accelerator, or why there is none of its kind."""
    kinds = {"cuda": _cuda, "xpu": _xpu, "mps": _mps}
    found = [finding for kind, probe in kinds.items() for finding in _accelerators(kind, probe)]
    return _try("cpu", _cpu), *found


def backends() -> tuple[Finding, ...]:
    """Returns what attention and image processing stand on."""
    probes = {
        "torch": lambda: str(import_module("torch").__version__),
        "torchvision": lambda: str(import_module("torchvision").__version__),
        "transformers": _transformers,
        "SDPA": _sdpa,
        "flash-attn": _flash_attention,
        "triton": _triton,
    }
    return tuple(_try(name, probe) for name, probe in probes.items())


def models() -> tuple[Finding, ...]:
    """Returns whether the files of each shipped model are the ones that were shipped."""
    try:
        from vtprune.eval import shipped

        names = shipped.names()
    except Exception as error:
        return (Finding("loader", False, _reason(error)),)
    return tuple(_try(name, partial(_whole, shipped, name)) for name in names)


def _try(name: str, probe: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, probe())
    except Exception as error:  # broken packages raise anything
        return Finding(name, False, _reason(error))


def _reason(error: BaseException) -> str:
    """Returns the first line of the message; of the cause, where an import failed over another."""
    while isinstance(error, ImportError) and error.__cause__:
        error = error.__cause__
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _accelerators(kind: str, probe: Callable[[], list[str]]) -> Iterator[Finding]:
    """Yields the devices that ``probe`` describes, each after one sum on it, or why it raises."""
    try:
        notes = probe()
    except Exception as error:
        yield Finding(kind, False, _reason(error))
        return
    for i, note in enumerate(notes):
        yield _try(f"{kind}:{i}", partial(_compute, f"{kind}:{i}", note))


def _compute(device: str, note: str) -> str:
    """A device can be listed and still lack kernels in this build, or free memory."""
    import_module("torch").ones(1, device=device).add(1).item()
    return note


def _cpu() -> str:
    torch = import_module("torch")
    kernels = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} ({kernels}), {torch.get_num_threads()} threads{_memory()}"


def _memory() -> str:
    try:
        return f", {_gib(os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE'))}"
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return ""


def _cuda() -> list[str]:
    torch = import_module("torch")
    if torch.version.cuda is None and torch.version.hip is None:
        raise RuntimeError("this torch is built without CUDA")
    torch.cuda.init()  # raises when there is no driver, or no device
    found = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [f"{p.name}, capability {p.major}.{p.minor}, {_gib(p.total_memory)}" for p in found]


def _xpu() -> list[str]:
    xpu = import_module("torch").xpu
    if not xpu.is_available():
        raise RuntimeError("no device that this torch can use")
    found = map(xpu.get_device_properties, range(xpu.device_count()))
    return [f"{p.name}, {_gib(p.total_memory)}" for p in found]


def _mps() -> list[str]:
    if not import_module("torch").backends.mps.is_available():
        raise RuntimeError("no device that this torch can use")
    return [f"{platform.machine()}, shares the memory of the CPU"]


def _transformers() -> str:
    transformers = import_module("transformers")
    _ = transformers.AutoProcessor, transformers.AutoModelForImageTextToText  # imported on use
    return str(transformers.__version__)


def _sdpa() -> str:
    flags = import_module("torch").backends.cuda
    kinds = ("flash", "mem_efficient", "cudnn", "math")
    enabled = [kind for kind in kinds if getattr(flags, f"{kind}_sdp_enabled")()]
    if not enabled:
        raise RuntimeError("every kind is disabled")
    return f"enabled: {', '.join(enabled)}"


def _flash_attention() -> str:
    version = import_module("flash_attn").__version__
    if not import_module("transformers.utils").is_flash_attn_2_available():
        raise RuntimeError(f"{version} imports, but transformers does not use it here")
    return str(version)


def _triton() -> str:
    triton, torch = import_module("triton"), import_module("torch")
    if not (torch.cuda.is_available() or torch.xpu.is_available()):
        raise RuntimeError(f"{triton.__version__} imports, but needs a GPU")
    target = triton.runtime.driver.active.get_current_target()  # builds its launcher, or says why
    return f"{triton.__version__} for {target.backend} {target.arch}"


def _whole(shipped: Any, name: str) -> str:
    shipped.verify(name)
    return "files are whole"


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"
