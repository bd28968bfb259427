"""Every family's tiny model: as built, and saved and loaded back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from vtprune.eval import tiny

Pair = tuple[Any, Any]


@pytest.fixture(scope="module", params=tiny.names())
def family(request: pytest.FixtureRequest) -> str:
    if request.param == "smolvlm":
        pytest.importorskip("num2words", reason="SmolVLM's processor needs num2words")
    return request.param


@pytest.fixture(scope="module")
def built(family: str) -> Pair:
    """Model and processor, shared by the tests of a module: leave them as they are."""
    return tiny.build(family)


@pytest.fixture(scope="module")
def folder(built: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a local checkpoint."""
    path = tmp_path_factory.mktemp("checkpoint")
    for part in built:
        part.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Pair:
    """What the Auto classes make of the directory alone."""
    model = AutoModelForImageTextToText.from_pretrained(folder, local_files_only=True)
    return model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True)
