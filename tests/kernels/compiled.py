"""Compiles kernels for GPUs that are not there, and says what would be wrong on them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest

triton: Any = pytest.importorskip("triton")
# Per target: how Triton names it, and the most shared memory of a program in KiB.
TARGETS = {
    "sm_80": (("cuda", 80, 32), 163),
    "sm_90": (("cuda", 90, 32), 227),
    "sm_100": (("cuda", 100, 32), 227),
    "gfx942": (("hip", "gfx942", 64), 64),
}


def built(
    kernel: Any,
    signature: Mapping[str, str | tuple[str, ...]],
    target: str,
    *,
    warps: int = 4,
    stages: int = 3,
    aligned: Collection[str] = (),
    **fixed,
) -> Any:
    """Returns what Triton compiles; raises AssertionError where it spills or shares too much.

    Args:
        signature: the type of each argument that is no constant, such as ``*fp32`` or ``i32``,
            or of each in a tuple.
        aligned: the pointers that 16 divides wherever the kernel is launched.
        fixed: the constants.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    place, most = TARGETS[target]
    types = {name: signature.get(name, "constexpr") for name in kernel.arg_names}
    assert set(types) == {*signature, *fixed}, "arguments without a type or a value"
    names = enumerate(kernel.arg_names)
    attrs = {(i,): [["tt.divisibility", 16]] for i, name in names if name in aligned}
    made = triton.compile(
        ASTSource(kernel, types, fixed, attrs),
        target=GPUTarget(*place),
        options={"num_warps": warps, "num_stages": stages},
    )
    assert made.metadata.shared <= most * 1024, f"{made.metadata.shared} bytes of shared memory"
    assert spilled(made) == 0, "registers spill"
    return made


def spilled(made: Any) -> int:
    """Returns how many bytes or registers of a thread do not fit."""
    if "amdgcn" in made.asm:
        found = re.findall(
            r"\.(?:[sv]gpr_spill_count|private_segment_fixed_size): +(\d+)", made.asm["amdgcn"]
        )
    else:
        found = re.findall(r"(?:LOCAL|STACK):(\d+)", usage(made.asm["cubin"]))
    assert found, "no figures of what is used"
    return sum(map(int, found))


def usage(cubin: bytes) -> str:
    """Returns what NVIDIA's tool, which comes with Triton, says of a binary."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
