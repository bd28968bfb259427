"""Tensors that say they are on another device while the CPU computes; mixing devices is an error.

They stand in for several GPUs. ``lazy`` is a device type that no CPU build of torch serves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

FIRST, SECOND = torch.device("lazy:0"), torch.device("lazy:1")
CPU = torch.device("cpu")
COPIES = {"aten._to_copy.default", "aten.copy_.default"}
# Indices may be on the CPU, as with real devices.
INDEXED = {"aten.index.Tensor", "aten.index_put.default", "aten.index_put_.default"}


class Far(Tensor):
    """``held`` is on the CPU, ``device`` is what is claimed."""

    held: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor, device: torch.device) -> Far:
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
        )
        made.held = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})

    def item(self) -> Any:
        return self.held.item()

    def tolist(self) -> Any:
        return self.held.tolist()


class _Everywhere(TorchDispatchMode):
    """Reaches the calls that make tensors, which have no argument to dispatch on."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


def compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Runs an operation on the CPU and says on which device its result is.

    Raises:
        RuntimeError: the operation mixes devices.
    """
    name = str(func)
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    far = [x for x in tensors if isinstance(x, Far)]
    device = _device(name, kwargs, tensors, far)
    near_args, near_kwargs = tree_map(_near, (args, kwargs))
    out = func(*near_args, **near_kwargs)
    if func._schema.is_mutable and isinstance(out, Tensor):
        return args[0]
    if device.type == "cpu":
        return out
    return tree_map(lambda x: Far(x, device) if isinstance(x, Tensor) else x, out)


def _device(
    name: str, kwargs: dict[str, Any], tensors: list[Tensor], far: list[Far]
) -> torch.device:
    devices = {x.device for x in far}
    near = any(x.ndim and x.device == CPU for x in tensors) and name not in INDEXED
    if name not in COPIES and (len(devices) > 1 or (devices and near)):
        places = [(str(x.device), tuple(x.shape)) for x in tensors]
        raise RuntimeError(f"{name} mixes devices: {places}")
    asked = kwargs.get("device")
    if asked is not None:
        return torch.device(asked)
    return next(iter(devices), CPU)


def _near(x: Any) -> Any:
    if isinstance(x, Far):
        return x.held
    return CPU if isinstance(x, torch.device) else x


@contextmanager
def several() -> Iterator[None]:
    """Lets tensors be made on the claimed devices within the block."""
    make, autocast, enabled = torch.tensor, torch.autocast, torch.is_autocast_enabled

    def tensor(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        data = tree_map(lambda x: x.item() if isinstance(x, Far) else x, data)
        made = make(data, *args, **kwargs)
        return made if device is None else made.to(device)

    def casting(kind: str, *args: Any, **kwargs: Any) -> Any:
        return nullcontext() if kind == FIRST.type else autocast(kind, *args, **kwargs)

    def is_cast(kind: str = CPU.type) -> bool:
        return kind != FIRST.type and enabled(kind)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch, "tensor", tensor)
        patch.setattr(torch, "autocast", casting)
        patch.setattr(torch, "is_autocast_enabled", is_cast)
        with _Everywhere():
            yield


def put(module: nn.Module, device: torch.device) -> None:
    """Moves all weights and buffers."""
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            moved = Far(_near(weight.data), device)
            setattr(part, name, nn.Parameter(moved, requires_grad=False))
        for name, buffer in part.named_buffers(recurse=False):
            part._buffers[name] = Far(_near(buffer), device)


def place(module: nn.Module, device: torch.device) -> None:
    """Moves a module, and from now on what it is called with, as accelerate's ``device_map`` does.

    accelerate too replaces ``forward``, so that hooks on the module see what comes from elsewhere.
    """
    put(module, device)
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(
            lambda x: x.to(device) if isinstance(x, Tensor) else x, (args, kwargs)
        )
        return inner(*args, **kwargs)

    module.forward = forward
