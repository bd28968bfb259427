"""Reduction in ViTs: nothing reduced is the model itself, merging is duplicating, undo is whole."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import vtprune
from tests.vits.models import (
    CLIP,
    CONFIG,
    DEPTH,
    NAMES,
    PATCHES,
    ROPE,
    answer,
    build,
    images,
)
from vtprune.engine import vit as engine
from vtprune.engine import vit_state
from vtprune.engine.vit_handle import ViTHandle
from vtprune.strategies.random import Random
from vtprune.strategies.tome import ToMe
from vtprune.types import Keys, Patches, Selection, Signals, Stage


def wrap(model: Any, *args: Any, **kwargs: Any) -> ViTHandle:
    handle: Any = vtprune.wrap(model, *args, **kwargs)
    assert isinstance(handle, ViTHandle)
    return handle


@pytest.mark.parametrize("name", NAMES)
def test_reducing_nothing_is_the_model_bit_for_bit(name: str) -> None:
    model, x = build(name), images()
    plain = answer(model, x)
    for amount in ({"reduce": 0}, {"keep": 1.0}, {"keep": PATCHES}, {"reduce": [0, 0]}):
        with wrap(model, "tome", **amount) as handle:
            assert torch.equal(answer(model, x), plain)
            assert handle.report().images[0].kept == PATCHES
            assert [s.is_identity for s in handle.selections] == [True, True]
    assert torch.equal(answer(model, x), plain)


@pytest.mark.parametrize("name", NAMES)
def test_blocks_by_halves_are_the_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = build(name), images()
    plain = answer(model, x)
    monkeypatch.setattr(engine.Passage, "_acts", lambda *args: True)
    with wrap(model, "tome", reduce=0):
        torch.testing.assert_close(answer(model, x), plain, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def answer_after(handle: ViTHandle, first: Tensor, x: Tensor, places: Tensor) -> Tensor:
    """The unwrapped model's answer where block 0 is made to give ``first``.

    ``places`` ``[B, n]`` are those of its patches, for the rotary embedding of later blocks.
    """
    adapter = handle.adapter

    def turned(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        rope = kwargs.get("rope")
        if rope is not None:
            picked = rope[places][:, None] if rope.ndim == 2 else rope[:, places].transpose(0, 1)
            kwargs = {**kwargs, "rope": picked}
        return args, kwargs

    with ExitStack() as undo:
        hook = adapter.blocks[0].register_forward_hook(lambda *args: first)
        undo.callback(hook.remove)
        for block in adapter.blocks[1:]:
            hook = block.register_forward_pre_hook(turned, with_kwargs=True)
            undo.callback(hook.remove)
        return answer(handle.model, x)


def merged_in_the_first(model: Any, x: Tensor, strategy: Any = "tome") -> tuple[Any, ...]:
    """The answer with a merge in block 0 alone, and what that block made."""
    seen: list[Tensor] = []
    handle = wrap(model, strategy, reduce=[24])
    block = handle.adapter.blocks[0]
    hook = block.register_forward_hook(lambda module, args, out: seen.append(out))
    reduced = answer(model, x)
    state = handle._passage.entering[1]
    hook.remove()
    handle.remove()
    return handle, reduced, seen[0], state


def duplicated(handle: ViTHandle, made: Tensor, state: vit_state.State, x: Tensor) -> Tensor:
    p = handle.adapter.n_prefix
    assert state.owner is not None and state.index is not None
    rows = state.owner[..., None].expand(-1, -1, made.shape[-1])
    first = torch.cat([made[:, :p], made[:, p:].gather(1, rows)], dim=1)
    return answer_after(handle, first, x, state.index.gather(1, state.owner))


@pytest.mark.parametrize("name", NAMES)
def test_merging_is_duplicating(name: str) -> None:
    model, x = build(name), images()
    handle, reduced, made, state = merged_in_the_first(model, x)
    assert made.shape[1] == PATCHES - 24 + handle.adapter.n_prefix
    torch.testing.assert_close(reduced, duplicated(handle, made, state, x), rtol=1e-5, atol=1e-5)


def _no_bias(*args: Any) -> None:
    return None


def _first_of(rope: Tensor, index: Tensor | None) -> Tensor:
    return rope if index is None else rope[: index.shape[1]]


FAULTS: dict[str, tuple[str, Any, str]] = {
    "no weight in blocks": ("added", _no_bias, "vit"),
    "rope not gathered": ("left_of", _first_of, "eva02_fused"),
    "plain mean": ("Passage.weigh", lambda self, x: x, "siglip_gap"),
    "plain pooler": ("Passage.bias", lambda self, length: None, "siglip_map"),
    "plain mean of the output": (
        "Passage.weigh",
        lambda self, x: x,
        "Dinov2ForImageClassification",
    ),
    "plain pooler of torch": ("Passage.bias", lambda self, length: None, "SiglipVisionModel"),
    "plain pooler of CoCa": ("Passage.bias", lambda self, length: None, "open_clip_coca"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_turn_the_oracle_red(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, replacement, name = FAULTS[fault]
    model, x = build(name), images()
    monkeypatch.setattr(f"vtprune.engine.vit.{where}", replacement)
    handle, reduced, made, state = merged_in_the_first(model, x)
    assert not torch.allclose(reduced, duplicated(handle, made, state, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["vit", "registers", *ROPE, "open_clip", "CLIPVisionModel"])
@pytest.mark.parametrize("strategy", ["random", "strided"])
def test_dropping_is_gathering(name: str, strategy: str) -> None:
    model, x = build(name), images()
    handle, reduced, made, state = merged_in_the_first(model, x, strategy)
    assert state.sizes is None and state.index is not None
    expected = answer_after(handle, made, x, state.index)
    torch.testing.assert_close(reduced, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "dinov3", "open_clip", "SiglipVisionModel"])
def test_every_patch_is_in_one_token(name: str) -> None:
    model, x = build(name), images(3)
    with wrap(model, "tome", reduce=10) as handle:
        answer(model, x)
        for state, n in zip(handle._passage.entering[1:], (54, 44, 34), strict=True):
            assert state.sizes is not None and state.owner is not None
            assert state.sizes.sum(1).tolist() == [PATCHES] * 3
            counted = torch.stack([row.bincount(minlength=n) for row in state.owner])
            assert torch.equal(counted.float(), state.sizes)
        for selection in handle.selections:
            assert selection.rows.shape == (1, 34) and selection.mix is not None
            assert torch.equal(selection.rows, selection.rows.sort().values)
            assert float(selection.apply(torch.ones(1, PATCHES, 1)).sub(1).abs().max()) < 1e-6
        report = handle.report()
        p = handle.adapter.n_prefix
        assert report.tiles[0].attended == (64 + p, 54 + p, 44 + p)
        assert report.tiles[0].passed == (54 + p, 44 + p, 34 + p)
        assert 0 < report.tower().share < 1 and "34 of 64" in str(report)


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


@pytest.mark.parametrize("name", ["vit", "siglip_map", "dinov3", "rope_mixed", "open_clip"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
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


@pytest.mark.parametrize(
    ("amount", "left"),
    [
        ({"reduce": 5}, (59, 54, 49)),
        ({"reduce": (5, -1.0)}, (54, 49, 49)),
        ({"reduce": (5, 1.0)}, (64, 59, 49)),
        ({"reduce": [1, 30]}, (63, 33, 33)),
        ({"reduce": 40}, (32, 16, 8)),
        ({"keep": 20}, (49, 34, 20)),
        ({"keep": 0.25}, (48, 32, 16)),
    ],
)
@pytest.mark.parametrize("strategy", ["tome", "random"])
def test_schedules(strategy: str, amount: Any, left: tuple[int, ...]) -> None:
    model = build("CLIPVisionModel")
    with wrap(model, strategy, **amount) as handle:
        answer(model, images())
        assert handle.report().tiles[0].passed == tuple(n + 1 for n in left)


@pytest.mark.parametrize("strategy", ["tome", "random"])
@pytest.mark.parametrize("saved", [0.2, 0.4])
def test_a_share_of_operations_is_saved(strategy: str, saved: float) -> None:
    for name in ("CLIPVisionModel", "vit", "eva02_split"):
        with wrap(build(name), strategy, reduce=saved) as handle:
            answer(handle.model, images())
            assert saved <= 1 - handle.report().tower().share < saved + 0.02


def test_layers_are_those_to_act_in() -> None:
    model = build("CLIPVisionModel")
    for strategy in ("tome", "random", "fastervlm"):
        with wrap(model, strategy, keep=20, layers=(1,)) as handle:
            answer(model, images())
            assert handle.report().tiles[0].passed == (65, 21, 21)
            assert handle.report().layers == (1,)


def test_a_row_is_decided_alone_and_by_its_attention() -> None:
    model, x = build("vit"), images(3)
    with wrap(model, "fastervlm", keep=20, layers=(1,)) as handle:
        together = answer(model, x)
        kept = [s.rows[0] for s in handle.selections]
        torch.testing.assert_close(answer(model, x[1:2]), together[1:2], rtol=1e-4, atol=1e-5)
        assert torch.equal(handle.selections[0].rows[0], kept[1])
    rows: list[Tensor] = []

    def look(module: Any, args: Any) -> None:
        rows.append(args[0])  # the weights, where attention is written out

    block = model.blocks[1]
    block.attn.fused_attn = False
    hook = block.attn.attn_drop.register_forward_pre_hook(look)
    answer(model, x)
    hook.remove()
    scores = rows[0][:, :, 0, 1:].mean(1)
    for score, chosen in zip(scores, kept, strict=True):
        assert torch.equal(score.topk(20).indices.sort().values, chosen)


def test_stages_read_what_earlier_blocks_gave_of_those_left() -> None:
    seen: list[Tensor] = []

    class Reads(Random):
        def plan(self, facts: Any) -> Any:
            stages = ToMe().plan(facts)
            own = (Patches(0),)
            return tuple(Stage(s.site, own, s.layer) for s in stages[1:])

        def score(self, signals: Signals) -> Tensor:
            seen.append(signals.stack(Patches)[0])
            return super().score(signals)

    model, x = build("CLIPVisionModel"), images()
    with wrap(model, Reads(), reduce=8) as handle:
        out: list[Tensor] = []
        hook = handle.adapter.blocks[0].register_forward_hook(lambda m, a, o: out.append(o))
        answer(model, x)
        hook.remove()
        state = handle._passage.entering[2]
    assert state.index is not None and torch.equal(seen[0], out[0][:, 1:])
    rows = state.index[..., None].expand(-1, -1, 48)
    assert torch.equal(seen[1], out[0][:, 1:].gather(1, rows))


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


@pytest.mark.parametrize("name", ["dinov3", "eva02_split", "rope_mixed"])
def test_keys_say_what_is_there_and_not_where(name: str) -> None:
    """A patch of the same content has the same keys anywhere: there is no rotary embedding."""
    seen: list[Tensor] = []

    class Looks(ToMe):
        def select(self, signals: Signals, k: int) -> Selection:
            seen.append(signals.stack(Keys)[-1])
            return super().select(signals, k)

    model = build(name)
    adapter: Any = None
    with wrap(model, Looks(), reduce=[8]) as handle:
        adapter = handle.adapter
        x = torch.randn(1, 1, 48).expand(2, PATCHES + adapter.n_prefix, -1)
        rope = model.rope.get_embed((8, 8))
        with torch.no_grad():
            adapter.blocks[0](x, rope=rope[0] if name == "rope_mixed" else rope)
    torch.testing.assert_close(seen[0], seen[0][:, :1].expand_as(seen[0]))
