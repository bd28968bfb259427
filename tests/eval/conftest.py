"""An untrained model in a directory, made once."""

from __future__ import annotations

import pytest
import torch

from vtprune.eval import shipped
from vtprune.eval.mini_llava import build_model, build_processor


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """Weights are scaled up, so that answers depend on what is seen."""
    path = tmp_path_factory.mktemp("models") / "untrained"
    model = build_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                std = 1.2 / parameter.shape[-1] ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    model.save_pretrained(path)
    build_processor().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def loaded(model_dir):
    return shipped.load(str(model_dir))
