"""What the entry point registers, and what the documents say of it."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from vtprune.serve.setting import KEYS
from vtprune.serve.vllm_plugin import ARCHITECTURES, register

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")


def test_every_process_may_register_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, str] = {}
    stub = ModuleType("vllm")
    vars(stub)["ModelRegistry"] = SimpleNamespace(register_model=seen.__setitem__)
    monkeypatch.setitem(sys.modules, "vllm", stub)
    register()
    register()
    assert seen == ARCHITECTURES


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_classes_are_where_they_are_said_to_be(name: str) -> None:
    module, _, defined = ARCHITECTURES[name].partition(":")
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    classes = [node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    assert defined == name
    assert name in classes


def test_the_entry_point_is_announced() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    where = f"{register.__module__}:{register.__name__}"
    assert project["entry-points"]["vllm.general_plugins"] == {"vtprune": where}


def test_the_document_lists_architectures_and_keys() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", DOCUMENT, re.MULTILINE)
    assert rows == [*ARCHITECTURES, *KEYS]
