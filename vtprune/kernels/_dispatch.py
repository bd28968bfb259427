"""Which form of an operation runs: plain torch, or a Triton kernel."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vtprune.errors import ConfigError, UnsupportedError

Backend = Literal["auto", "torch", "triton"]
DEVICES = ("cuda", "xpu")  # torch calls AMD's devices cuda too
OLDEST = (3, 6)
# Whether kernels run line by line on the CPU, which is slow but needs no GPU; Triton reads it once.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
_chosen: list[Backend] = ["auto"]
_calls: Counter[tuple[str, str]] = Counter()


class use:
    """Chooses what operations run, from now on, or until the end of a ``with``.

    Args:
        backend: ``auto`` takes kernels on GPUs and torch elsewhere, or where a kernel does not take
            an input; ``torch`` always takes torch; ``triton`` always kernels, and an operation that
            has none for its input raises UnsupportedError and says why.

    Raises:
        ConfigError: another backend.
    """

    def __init__(self, backend: Backend) -> None:
        if backend not in get_args(Backend):
            known = ", ".join(get_args(Backend))
            raise ConfigError(f"kernels.use({backend!r}): give one of {known}.")
        self.before: Backend = _chosen[0]
        _chosen[0] = backend

    def __enter__(self) -> None:
        return None

    def __exit__(self, *error: object) -> None:
        _chosen[0] = self.before


def stats() -> dict[tuple[str, str], int]:
    """Returns how often each operation ran in this process, by its name and the backend.

    What torch runs within a graph of ``torch.compile`` is not counted.
    """
    return dict(_calls)


def reset_stats() -> None:
    """Counts from 0 again."""
    _calls.clear()


def run(
    name: str,
    reference: Callable[..., Any],
    kernel: Callable[..., Any],
    refused: str | None,
    *args: Any,
    pays: bool = True,
) -> Any:
    """Runs an operation in the form that was chosen.

    Args:
        name: of the operation; the kernel's own code is ``_triton/<name>.py``.
        reference: the form in torch.
        kernel: a custom operation of the same arguments, for gradients and graphs.
        refused: why the kernel does not take these arguments; None = it does.
        args: tensors that may be None, lists of tensors, and numbers; the first is a tensor.
        pays: whether ``auto`` is to take the kernel; where torch is as fast, it is not.

    Raises:
        UnsupportedError: kernels only are allowed, but there is none for these arguments.
    """
    if not _takes_kernel(name, args[0], refused, pays):
        if not torch.compiler.is_compiling():
            _calls[name, "torch"] += 1
        return reference(*args)
    # A custom operation costs tens of microseconds per call, as long as most kernels run.
    if torch.compiler.is_compiling() or learns(*args):
        return kernel(*args)
    return launch(name, *args)


def learns(*args: Any) -> bool:
    """Returns whether gradients are wanted of one of these tensors, or of lists of them."""
    parts = (x for arg in args for x in (arg if isinstance(arg, list) else [arg]))
    return torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in parts)


def launch(name: str, *args: Any) -> Any:
    """Runs the kernel of an operation on the device of its first argument."""
    _calls[name, "triton"] += 1
    module = import_module(f"vtprune.kernels._triton.{name}")
    if args[0].device.type == "cpu":
        return module.launch(*args)
    with torch.get_device_module(args[0].device).device(args[0].device):
        return module.launch(*args)


def _takes_kernel(name: str, x: Tensor, refused: str | None, pays: bool) -> bool:
    chosen = _chosen[0]
    if chosen == "torch" or (chosen == "auto" and not (pays and x.device.type in DEVICES)):
        return False
    reason = _MISSING or _elsewhere(x) or refused
    if reason and chosen == "triton":
        raise UnsupportedError(
            f"{name} has no kernel for this call: {reason}. Allow torch with "
            "vtprune.kernels.use('auto')."
        )
    return reason is None


def _elsewhere(x: Tensor) -> str | None:
    if x.device.type not in DEVICES and not INTERPRETING:
        return f"tensors are on {x.device.type!r}, but kernels run on {' and '.join(DEVICES)}"
    if type(x) not in (Tensor, torch.nn.Parameter):
        return f"it got a {type(x).__name__}, not a plain tensor"
    return None


def _missing() -> str | None:
    """Says why kernels cannot run at all, without loading Triton."""
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "triton is not installed (pip install 'vtprune[kernels]')"
    if tuple(int(part) for part in found.split(".")[:2]) < OLDEST:
        return f"triton is {found}, but kernels need {'.'.join(map(str, OLDEST))} or newer"
    return None


_MISSING = _missing()
