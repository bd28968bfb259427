"""Time and memory of the operations by provider, against what the device can do at best.

The floor of a call is the longer of two times: what it has to read and write, at the rate of a
copy, and the matrix products that it needs, at the rate of a large product in their dtype. Every
provider is first checked against the operation in float64; one that is wrong is not timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vtprune import kernels
from vtprune.errors import ConfigError, UnsupportedError
from vtprune.eval._extras import need
from vtprune.eval.bench_ops import OPS, Op, Shape, tensors_of

# What runs: written by hand; the form in torch, compiled and as it is; the kernel.
PROVIDERS = ("torch-eager", "torch-compile", "torch", "triton")
DTYPES = ("float32", "bfloat16", "float16")
# What a form may lose that computes in float32, from numbers of 16 bits too; or in 16 bits.
IN_32, OF_16, BY_HAND_IN_16 = 1e-5, 1e-4, 0.05
SECONDS = 0.1  # that a provider has in a round
MIB = 1 << 20


@dataclass(frozen=True)
class Floor:
    """What a device reaches: bytes per second of a copy, and products' FLOP/s by dtype."""

    copy: float
    products: dict[str, float]

    def ms(self, n_bytes: float, flops: float, dtype: str) -> float:
        """Returns the shortest time of a call that moves and multiplies as much."""
        return 1000 * max(n_bytes / self.copy, flops / self.products[dtype])


@dataclass(frozen=True)
class Case:
    """One operation in one shape and dtype."""

    op: str
    shape: Shape
    dtype: str

    @property
    def size(self) -> str:
        """The shape as a text."""
        return " ".join(f"{name}={value}" for name, value in self.shape.items())


@dataclass(frozen=True)
class Result:
    """What a provider did with a case; ``status`` is ``ok``, or why there are no times.

    ``error`` is how far it was from float64, ``mib`` what it allocated at most, on GPUs only.
    """

    case: Case
    provider: str
    status: str
    error: float | None = None
    mib: float | None = None
    n_bytes: int = 0
    flops: int = 0
    floor_ms: float = 0.0
    ms: tuple[float, float, float] | None = None  # median, 20 % and 80 % of all calls

    @property
    def share(self) -> float | None:
        """What the floor is of the median."""
        return self.floor_ms / self.ms[0] if self.ms else None


def cases(ops: Sequence[str], dtypes: Sequence[str], quick: bool) -> list[Case]:
    """Returns what is measured; an operation that takes one dtype only is measured in that."""
    found = []
    for name in ops:
        op = OPS[name]
        for dtype in [op.dtype] if op.dtype else dtypes:
            found += [Case(name, shape, dtype) for shape in (op.quick if quick else op.shapes)]
    return found


def measure_floor(device: torch.device, dtypes: Sequence[str], quick: bool) -> Floor:
    """Measures how fast the device copies and multiplies."""
    size, side = (16 * MIB, 512) if quick else (512 * MIB, 8192 if on_gpu(device) else 2048)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * size / fastest(lambda: target.copy_(source), device)
    products = {}
    for dtype in dtypes:
        x = torch.ones(side, side, dtype=getattr(torch, dtype), device=device)
        products[dtype] = 2 * side**3 / fastest(lambda x=x: x @ x, device)
    return Floor(copy, products)


def fastest(call: Callable[[], Any], device: torch.device) -> float:
    """Returns the seconds of a call at best."""
    return min(timed(call, device)) / 1000


def timed(call: Callable[[], Any], device: torch.device) -> list[float]:
    """Returns the milliseconds of calls one after the other; a GPU's cache is emptied between."""
    if on_gpu(device):
        testing: Any = need("triton.testing", extra="kernels")
        return testing.do_bench(call, warmup=25, rep=int(1000 * SECONDS), return_mode="all")
    times, end = [], time.perf_counter() + SECONDS
    while not times or time.perf_counter() < end:
        began = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - began))
    return times


def on_gpu(device: torch.device) -> bool:
    """Whether the device is no CPU."""
    return device.type != "cpu"


def arguments(case: Case, device: torch.device) -> tuple[Any, ...]:
    """Returns the arguments of a case, the same in every run on a device."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device)

    return OPS[case.op].make(normal, getattr(torch, case.dtype), case.shape)


def measure(
    case: Case, providers: Sequence[str], device: torch.device, floor: Floor, rounds: int
) -> list[Result]:
    """Returns what each provider does with a case; those that are right take turns."""
    torch.compiler.reset()
    op = OPS[case.op]
    try:
        args = arguments(case, device)
        want, n_bytes = in_float64(op, args), n_bytes_of(op, args)
    except torch.OutOfMemoryError:
        status = "out of memory: the arguments, or the float64 they are checked against"
        return [Result(case, name, status) for name in providers]
    calls = {name: provided(op, name, args) for name in providers}
    found = [tried(case, name, calls[name], want, device) for name in providers]
    times: dict[str, list[float]] = {r.provider: [] for r in found if r.status == "ok"}
    for _ in range(rounds):
        for name in times:
            with kernels.use(backend(name)):
                times[name] += timed(calls[name], device)
    flops = int(op.flops(case.shape))
    least = floor.ms(n_bytes, flops, op.products or case.dtype)
    figures = {"n_bytes": n_bytes, "flops": flops, "floor_ms": least}
    return [
        replace(r, ms=quantiles(times[r.provider]) if r.provider in times else None, **figures)
        for r in found
    ]


def in_float64(op: Op, args: Sequence[Any]) -> Any:
    """Returns what the form in torch makes of the same numbers."""
    doubled = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]
    with kernels.use("torch"):
        return op.ours(*doubled)


def n_bytes_of(op: Op, args: Sequence[Any]) -> int:
    """Returns what a call has to read and write at least."""
    with kernels.use("torch"):
        return op.n_bytes(args, op.ours(*args))


def provided(op: Op, provider: str, args: Sequence[Any]) -> Callable[[], Any]:
    """Returns a call of the operation in the form of a provider."""
    form = op.by_hand if provider == "torch-eager" else op.ours
    if provider == "torch-compile":
        form = torch.compile(form, fullgraph=True, dynamic=False)
    return lambda: form(*args)


def backend(provider: str) -> kernels.Backend:
    """Returns which form the operations are to take."""
    return "triton" if provider == "triton" else "torch"


def tried(
    case: Case, provider: str, call: Callable[[], Any], want: Any, device: torch.device
) -> Result:
    """Runs a provider once: whether it can, is right, and ran what its name says."""
    result = Result(case, provider, "ok")
    reason = left_out(case, provider, device)
    if reason:
        return replace(result, status=f"left out: {reason}")
    kernels.reset_stats()
    try:
        with kernels.use(backend(provider)):
            got, mib = peak(call, device)
    except torch.OutOfMemoryError:
        return replace(result, status="out of memory")
    except UnsupportedError as error:
        return replace(result, status=f"left out: {error}")
    except Exception as error:  # the other providers can go on
        reason = str(error).strip().partition("\n")[0]
        return replace(result, status=f"failed: {type(error).__name__}: {reason}")
    check_ran(case.op, provider)
    error = OPS[case.op].error(got, want)
    status = "ok" if error <= limit(case, provider, got) else f"wrong by {error:.2g}"
    return replace(result, status=status, error=error, mib=mib)


def left_out(case: Case, provider: str, device: torch.device) -> str | None:
    """Says why a provider cannot be measured."""
    if provider == "triton" and not on_gpu(device):
        return "kernels run on GPUs"
    if provider == "torch-compile" and OPS[case.op].unrolled:
        return "its loop over picks would be unrolled"
    return None


def peak(call: Callable[[], Any], device: torch.device) -> tuple[Any, float | None]:
    """Returns what a second call returns, and how many MiB it allocates at most, on GPUs."""
    if not on_gpu(device):
        return call(), None
    memory = torch.get_device_module(device)
    call()
    memory.synchronize(device)
    memory.reset_peak_memory_stats(device)
    before = memory.memory_allocated(device)
    out = call()
    memory.synchronize(device)
    return out, (memory.max_memory_allocated(device) - before) / MIB


def check_ran(op: str, provider: str) -> None:
    """Raises RuntimeError unless the operation ran in the form of the provider.

    A graph of torch and what is written by hand count no calls.
    """
    ran = kernels.stats()
    counted = provider in ("torch", "triton")
    right = (op, backend(provider)) in ran and {form for _, form in ran} == {backend(provider)}
    if (counted and not right) or (not counted and ran):
        raise RuntimeError(f"{provider} of {op} ran {ran or 'nothing that is counted'}.")


def limit(case: Case, provider: str, got: Any) -> float:
    """Returns how far a provider may be off."""
    given = OPS[case.op].limit
    if given is not None:
        return given
    if case.dtype == "float32":
        return IN_32
    if provider == "torch-eager":
        return BY_HAND_IN_16
    steps = [torch.finfo(x.dtype).eps for x in tensors_of(got) if x.dtype.itemsize == 2]
    return max([OF_16, *steps])


def quantiles(ms: Sequence[float]) -> tuple[float, float, float]:
    """Returns median, 20 % and 80 % quantile."""
    found = torch.tensor(ms, dtype=torch.float64).quantile(torch.tensor([0.5, 0.2, 0.8]).double())
    middle, low, high = found.tolist()
    return middle, low, high


def usable(device: str) -> torch.device:
    """Returns the device, which becomes the current one of its kind.

    Raises:
        ConfigError: torch cannot use it, or its times cannot be taken.
    """
    try:
        found = torch.device(device)
        torch.ones(1, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"device={device!r} cannot be used: {reason}") from error
    if found.type not in ("cpu", "cuda", "xpu"):
        raise ConfigError(f"device={device!r} cannot be timed; give cpu, cuda or xpu.")
    if found.index is not None and on_gpu(found):
        torch.get_device_module(found).set_device(found)
    return found
