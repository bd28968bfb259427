"""Wrong settings: no engine starts, and its error is ours."""

from __future__ import annotations

from typing import Any

import pytest

from tests.serve import served
from vtprune.errors import VTPruneError

CASES: list[tuple[str, dict[str, Any], str]] = [
    ("mini-llava", {"strategy": "fastv", "keep": 64}, "acts inside the language model"),
    ("mini-llava", {"strategy": "trim", "keep": 64}, "trim reads the instruction"),
    ("mini-llava", {"strategy": "vscan", "keep": 64}, "as many tokens as the image asks for"),
    ("mini-llava", {"strategy": "fastervlm", "keep": 1.5}, "keep=1.5 is not a share"),
    ("mini-llava", {"strategy": "fastervlm", "keep": 257}, "an image has 256 tokens"),
    ("mini-llava", {"strategy": "fastervlm", "kept": 64}, "Did you mean 'keep'"),
    ("mini-llava", {"strategy": "fastervlmm", "keep": 64}, "Did you mean 'fastervlm'"),
    ("mini-llava", {}, "names no strategy"),
    ("mini-qwen", {"strategy": "cdpruner", "keep": 0.5}, "cdpruner reads the instruction"),
]
ARCHITECTURES = {"mini-llava": "VtpruneLlava", "mini-qwen": "VtpruneQwen2_5_VL"}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("served")
    return {
        name: served.checkpoint(served.shipped_folder(name), folder / name)
        for name in ARCHITECTURES
    }


@pytest.mark.parametrize(("model", "setting", "said"), CASES)
def test_no_engine_starts(paths: Any, model: str, setting: dict[str, Any], said: str) -> None:
    with pytest.raises(VTPruneError, match=said):
        served.start(paths[model], setting, ARCHITECTURES[model])
