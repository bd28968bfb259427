"""How a wrapped ViT behaves: undo, copies, compiling, intermediates, gradients, 16 bits, pairs."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import Tensor

import vtprune
from tests.vits.models import (
    CLIP,
    CONFIG,
    DEPTH,
    PATCHES,
    answer,
    build,
    images,
    wrap,
)


def test_undo_restores_everything_and_a_second_handle_is_refused() -> None:
    model, x = build("SiglipVisionModel"), images()
    plain = answer(model, x)
    modules = dict(model.named_modules())
    before = {name: {k: v for k, v in vars(m).items()} for name, m in modules.items()}
    handle = wrap(model, "tome", reduce=8)
    with pytest.raises(vtprune.UnsupportedError, match="wrapped already"):
        vtprune.wrap(model, "tome", reduce=8)
    assert not torch.equal(answer(model, x), plain)
    handle.remove()
    handle.remove()
    assert torch.equal(answer(model, x), plain)
    for name, module in modules.items():
        assert vars(module).keys() == before[name].keys()
        assert not module._forward_hooks and not module._forward_pre_hooks


def test_a_copy_is_wrapped_by_itself() -> None:
    model, x = build("ViTForImageClassification"), images()
    with wrap(model, "tome", reduce=8):
        reduced = answer(model, x)
        twin = copy.deepcopy(model)
    assert torch.equal(answer(twin, x), reduced)
    with torch.no_grad():
        twin.vit.layers[1].mlp.fc1.weight.zero_()
    assert not torch.equal(answer(twin, x), reduced)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("vit", "aot_eager"),
        *(
            pytest.param(name, backend, marks=pytest.mark.slow)
            for name in ("vit", "siglip_map", "dinov3", "rope_mixed", "open_clip")
            for backend in ("eager", "aot_eager")
            if (name, backend) != ("vit", "aot_eager")
        ),
    ],
)
def test_static_schedules_compile_to_one_graph(name: str, backend: str) -> None:
    model = build(name)
    with wrap(model, "tome", reduce=8) as handle:
        expected = [answer(model, images(n)) for n in (2, 3)]
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        for x, wanted in zip((images(2), images(3)), expected, strict=True):
            torch.testing.assert_close(answer(compiled, x), wanted, rtol=1e-5, atol=1e-5)
        assert handle.report().images[0].kept == PATCHES - 8 * DEPTH


def test_intermediates_are_in_their_places() -> None:
    x = images()
    for name in ("vit", "dinov3", "open_clip"):
        model = build(name)
        with wrap(model, "tome", reduce=8) as handle, torch.no_grad():
            answer(model, x)
            last = handle._passage.entering[-1]
            found = handle.adapter.tower.forward_intermediates(x)
            maps = found["image_intermediates"] if isinstance(found, dict) else found[1]
            assert {tuple(m.shape[2:]) for m in maps} == {(8, 8)} and len(maps) == DEPTH
            flat = maps[-1].flatten(2).mT
            assert last.owner is not None
            for row, owner in zip(flat, last.owner, strict=True):
                for token in range(int(owner.max()) + 1):
                    same = row[owner == token]
                    assert torch.equal(same, same[:1].expand_as(same))
                assert len(row.unique(dim=0)) == PATCHES - 8 * DEPTH


def test_hidden_states_are_of_all_patches_and_attentions_refused() -> None:
    model, x = build("SiglipVisionModel"), images()
    with wrap(model, "tome", reduce=8), torch.no_grad():
        pooled = model(x).pooler_output
        out = model(x, output_hidden_states=True)
        assert {h.shape[1] for h in out.hidden_states} == {PATCHES}
        torch.testing.assert_close(out.pooler_output, pooled, rtol=1e-5, atol=1e-5)
        assert model(x).last_hidden_state.shape[1] == PATCHES - 8 * DEPTH
        with pytest.raises(vtprune.UnsupportedError, match="output_attentions"):
            model(x, output_attentions=True)
    with (
        wrap(model, "random", keep=0.5),
        pytest.raises(vtprune.UnsupportedError, match="lets patches leave"),
    ):
        model(x, output_hidden_states=True)


def test_gradient_checkpointing_sees_the_same_states() -> None:
    model, x = build("vit"), images()
    model.train()

    def gradient() -> Tensor:
        model.zero_grad()
        model(x).square().sum().backward()
        return model.blocks[0].attn.qkv.weight.grad.clone()

    with wrap(model, "tome", reduce=8):
        plain = gradient()
        model.set_grad_checkpointing()
        torch.testing.assert_close(gradient(), plain)


@pytest.mark.parametrize("name", ["vit", "dinov3", "siglip_map", "open_clip_coca"])
def test_sixteen_bits_and_autocast(name: str) -> None:
    model, x = build(name), images()
    with wrap(model, "tome", reduce=8):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert answer(model, x).isfinite().all()
        out = answer(model.bfloat16(), x.bfloat16())
        assert out.dtype == torch.bfloat16 and out.isfinite().all()


def test_only_the_vision_tower_of_a_pair_is_reduced() -> None:
    open_clip = pytest.importorskip("open_clip")
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    pair = open_clip.model.CLIP(embed_dim=32, vision_cfg=CLIP, text_cfg=text).eval()
    words, x = torch.randint(0, 50, (2, 8)), images()
    said, seen = pair.encode_text(words), pair.encode_image(x)
    with wrap(pair, "tome", reduce=8) as handle:
        assert torch.equal(pair.encode_text(words), said)
        assert not torch.equal(pair.encode_image(x), seen)
        assert handle.report().images[0].kept == PATCHES - 8 * DEPTH
    config = transformers.CLIPConfig(vision_config=CONFIG, text_config={"num_hidden_layers": 1})
    pair = transformers.CLIPModel(config).eval()
    with wrap(pair, "tome", reduce=8) as handle, torch.no_grad():
        pair.get_image_features(images())
        assert handle.report().images[0].kept == PATCHES - 8 * DEPTH
