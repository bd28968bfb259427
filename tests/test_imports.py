"""What may import what, what stays unloaded, and how large files may grow."""

from __future__ import annotations

import ast
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vtprune

ROOT = Path(vtprune.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
OPTIONAL = {
    "lmms_eval",
    "matplotlib",
    "open_clip",
    "plotly",
    "pyarrow",
    "rich",
    "scipy",
    "sklearn",
    "timm",
}
OPTIONAL |= {"triton", "typer", "vllm"}

VOCABULARY = {"vtprune.types", "vtprune.needs", "vtprune.selection", "vtprune.budget"}
VOCABULARY |= {"vtprune.attending", "vtprune.evicting"}
VOCABULARY |= {"vtprune.errors", "vtprune.kernels", "vtprune.rules", "vtprune.signals"}
VOCABULARY |= {"vtprune.interventions"}
TRAINED = {"vtprune.gates", "vtprune.projectors", "vtprune.trained"}
# Folder or file -> what it may import besides the standard library.
ALLOWED = {
    "errors": set(),
    "assisted": {"vtprune.engine", "vtprune.errors", "torch", "transformers"},
    "attending": {"vtprune.kernels", "torch"},
    "budget": {"vtprune.errors"},
    "evicting": {"vtprune.budget", "torch"},
    "interventions": {"vtprune.errors", "vtprune.needs", "vtprune.rules", "torch"},
    "kernels": {"vtprune.errors", "vtprune.kernels", "torch", "triton"},
    "needs": {"vtprune.errors"},
    "rules": {"vtprune.errors", "vtprune.needs", "torch"},
    "selection": {"vtprune.kernels", "torch"},
    "signals": {"vtprune.budget", "vtprune.errors", "vtprune.needs", "torch"},
    "types": {*VOCABULARY, "torch"},
    "scoring": {*VOCABULARY, "vtprune.scoring", "torch"},
    "gates": {*VOCABULARY, "vtprune.scoring", "vtprune.trained", "safetensors", "torch"},
    "trained": {"vtprune.errors", "safetensors", "torch"},
    "projectors": {*VOCABULARY, "vtprune.trained", "safetensors", "torch"},
    "strategies": {*VOCABULARY, *TRAINED, "vtprune.scoring", "vtprune.strategies", "torch"},
    "vlm_adapters": {*VOCABULARY, "vtprune.vlm_adapters", "torch", "transformers"},
    "vit_adapters": {*VOCABULARY, "vtprune.flops", "vtprune.vit_adapters", "timm", "torch"},
    "flops": {"vtprune.errors"},
    "registry": {
        *(*VOCABULARY, "vtprune.strategies"),
        *("vtprune.vit_adapters", "vtprune.vlm_adapters"),
    },
    "setting": {"vtprune.budget", "vtprune.errors", "vtprune.registry", "yaml"},
    "contrast": {
        *VOCABULARY,
        *("vtprune.contrast", "vtprune.engine", "vtprune.scoring"),
        *("PIL", "torch", "transformers"),
    },
    "engine": {
        *(*VOCABULARY, "vtprune.scoring.sinks"),
        "vtprune.engine",
        "vtprune.flops",
        "vtprune.registry",
        "vtprune.setting",
        "vtprune.vit_adapters",
        "vtprune.vlm_adapters",
        "packaging",
        "torch",
        "transformers",
    },
    "_versions": set(),
    "_pytest_golden": set(),
    "__init__": {*VOCABULARY, "vtprune.engine", "vtprune._versions"},
}
# The top: these may import everything below them.
FREE = {"eval", "serve", "__main__"}

# Loads what transformers brings along by itself first, so that only vtprune's own doing shows;
# then every public name, since they are imported on first use.
LOADED = """
import builtins, json, sys
from transformers import PreTrainedModel
before = set(sys.modules)
asked = []
real = builtins.__import__

def spy(name, scope=None, *rest):
    if str((scope or {}).get("__name__")).partition(".")[0] == "vtprune":
        asked.append(name)
    return real(name, scope, *rest)

builtins.__import__ = spy
import vtprune
for name in vtprune.__all__:
    getattr(vtprune, name)
names = [*asked, *(set(sys.modules) - before)]
print(json.dumps(sorted({name.partition(".")[0] for name in names})))
"""


def imports(source: str) -> Iterator[str]:
    """Dotted names of everything that ``source`` imports, at any depth."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (f"{node.module}." if node.module else "")
            yield from (f"{origin}{alias.name}" for alias in node.names)


def offenders(room: str, source: str) -> list[str]:
    """Imports of ``source`` that a file of this room must not have."""

    def fits(name: str) -> bool:
        if name.partition(".")[0] in sys.stdlib_module_names:
            return True
        return any(name == ok or name.startswith(f"{ok}.") for ok in ALLOWED[room])

    return [name for name in imports(source) if not fits(name)]


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def roots_loaded(script: str) -> set[str]:
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT.parent
    )
    return set(json.loads(result.stdout))


def test_public_names_load_nothing_optional() -> None:
    loaded = roots_loaded(LOADED)
    assert {"vtprune", "torch"} <= loaded  # the spy sees
    assert not loaded & OPTIONAL


def test_import_alone_loads_not_even_torch() -> None:
    script = (
        "import json, sys, vtprune; print(json.dumps([m.partition('.')[0] for m in sys.modules]))"
    )
    assert not roots_loaded(script) & {*OPTIONAL, "torch", "transformers"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_import_direction(path: Path) -> None:
    room = room_of(path)
    if room in FREE:
        assert not [name for name in imports(path.read_text("utf-8")) if name.startswith(".")]
        return
    assert room in ALLOWED, f"{room} has no rule; add one to ALLOWED"
    assert offenders(room, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("room", "source", "found"),
    [
        ("strategies", "from vtprune.engine.wrap import Handle", "vtprune.engine.wrap.Handle"),
        ("strategies", "import transformers", "transformers"),
        ("strategies", "from vtprune import registry", "vtprune.registry"),
        ("scoring", "from vtprune.vlm_adapters import llava", "vtprune.vlm_adapters.llava"),
        ("kernels", "def f():\n    import vtprune.types", "vtprune.types"),
        ("types", "from vtprune.scoring.text import x", "vtprune.scoring.text.x"),
        ("vlm_adapters", "import vtprune.engine.tap", "vtprune.engine.tap"),
        ("engine", "from vtprune.eval import scenes", "vtprune.eval.scenes"),
        ("engine", "from .. import eval", "..eval"),
    ],
)
def test_import_direction_sees_offenders(room: str, source: str, found: str) -> None:
    assert offenders(room, f"import math\nimport torch\n{source}") == [found]


def test_strategy_files_are_short() -> None:
    sizes = [lines(p) for p in (ROOT / "strategies").glob("*.py") if not p.name.startswith("_")]
    assert len(sizes) >= 6
    assert statistics.median(sizes) <= 80


def test_no_file_is_long() -> None:
    assert {str(p.relative_to(ROOT)): lines(p) for p in FILES if lines(p) > 350} == {}


def test_public_names() -> None:
    assert len(vtprune.__all__) <= 14
    assert len(set(vtprune.__all__)) == len(vtprune.__all__)
    assert [name for name in vtprune.__all__ if not hasattr(vtprune, name)] == []
