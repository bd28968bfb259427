"""The recorded ViT of ToMe's authors, on timm itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import one_hot

import vtprune

CASES = sorted((Path(__file__).parents[1] / "golden" / "tome").glob("*_vit*.json"))


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_tome_as_its_authors_run_it(case: Path) -> None:
    vision_transformer: Any = pytest.importorskip("timm.models.vision_transformer")
    params = json.loads(case.read_text("utf-8"))["params"]
    tensors = load_file(case.with_suffix(".safetensors"))
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")
    model = vision_transformer.VisionTransformer(
        **{name: params[name] for name in names},
        num_classes=params["num_classes"],
        qkv_bias=params["qkv_bias"],
    ).eval()
    state = {k.removeprefix("in.state."): v for k, v in tensors.items() if "in.state." in k}
    model.load_state_dict(state)
    x, reduce = tensors["in.image"], params["r_per_block"]
    with torch.no_grad():
        torch.testing.assert_close(model(x), tensors["out.logits_unreduced"], rtol=1e-4, atol=1e-5)
        handle: Any = vtprune.wrap(model, "tome", reduce=reduce, prop_attn=params["prop_attn"])
        with handle:
            logits = model(x)
    torch.testing.assert_close(logits, tensors["out.logits"], rtol=1e-4, atol=1e-5)
    last = handle._passage.entering[-1]
    n = params["tokens_after"]
    source = one_hot(last.owner + 1, n).mT[:, 1:].to(torch.uint8)  # without [CLS]
    recorded = tensors["out.source"]
    order = recorded[:, 1:].argmax(-1).argsort(dim=1)
    ours = source.argmax(-1).argsort(dim=1)
    picked = recorded[:, 1:, 1:].gather(1, order[..., None].expand(-1, -1, source.shape[2]))
    assert torch.equal(source.gather(1, ours[..., None].expand_as(source)), picked)
    sizes = tensors["out.size"][:, 1:, 0].gather(1, order)
    assert torch.equal(last.sizes.gather(1, ours), sizes)


def test_there_is_such_a_case() -> None:
    assert CASES
