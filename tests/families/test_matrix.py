"""The oracle matrix: family x site x batch kind x attention x cache.

Keep all is bit-identical; dropping or merging equals the full-length model that hides the others.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

import vtprune
from tests.families import prompts
from tests.families.reference import Reference, mixed
from tests.hidden import Watch
from tests.probes import generate
from vtprune.errors import VTPruneError
from vtprune.eval import tiny

FAMILIES = tiny.names()
# Site -> (strategies, budgets).
SITES: dict[str, tuple[Any, Any]] = {
    "tower": ("visionzip", 0.4),
    "tower stages": ("flowcut", 0.4),
    "projector": ("fastervlm", 0.4),
    "decoder": ("fastv", 0.4),
    "decoder stages": ("pyramiddrop", 0.6),
    "both": (["divprune", "fastv"], [0.7, 0.5]),
}
STEPS = 10
NEWLINES = ("llava_next", "llava_next_video", "llava_onevision")
CASES = [(family, kind) for family in FAMILIES for kind in prompts.kinds(family)]


@cache
def model_of(family: str, attention: str = "sdpa") -> Any:
    return tiny.build(family, attention)


@cache
def inputs_of(family: str, kind: str) -> dict[str, torch.Tensor]:
    inputs = prompts.inputs(model_of(family)[1], kind)
    inputs.pop("labels", None)
    return inputs


def check(family: str, kind: str, site: str, attention: str = "sdpa", **options: Any) -> None:
    """Holds a wrapped call against the reference."""
    strategy, keep = SITES[site]
    model, inputs = model_of(family, attention)[0], inputs_of(family, kind)
    wrap = {key: options.pop(key) for key in ("positions", "newlines") if key in options}
    watch = Watch()
    with watch.watching(), vtprune.wrap(model, strategy, keep=keep, **wrap) as handle:
        ids, logits = generate(model, inputs, STEPS, **options)
        assert all(image.kept <= image.tokens for image in handle.report().images)
        fewer = sum(image.kept < image.tokens for image in handle.report().images)
        assert fewer or handle.report().stages
    made = None
    if any(s.mix is not None for s in handle.selections) and handle.adapter.facts.in_tower:
        made = in_tower(model_of(family, "eager")[0], inputs, handle)
    eager = model_of(family, "eager")[0]
    with watch.hiding(model, eager):
        wanted_ids, wanted = Reference(eager, inputs, handle, made).greedy(STEPS)
    assert torch.equal(ids, wanted_ids)
    assert (logits - wanted).abs().max() < 1e-4


def refused(family: str, site: str, options: dict[str, Any]) -> str | None:
    """What the message says about a combination that cannot be right; None where it must work."""
    inside = site in ("decoder", "decoder stages", "both")
    if options.get("use_cache") is False and inside:
        return "use_cache=False does not go"
    if options.get("cache_implementation") and inside and family == "gemma3":
        return "sliding window"
    if options.get("positions") == "renumber" and "qwen" in family:
        return "time, height and width"
    if options.get("newlines") and family not in NEWLINES:
        return "no tokens that end a row"
    return None


@torch.no_grad()
def in_tower(model: Any, inputs: dict[str, torch.Tensor], handle: Any) -> list[torch.Tensor]:
    """Tokens of every item, mixed in the tower's own states and then projected, in slot order."""
    made: list[torch.Tensor] = []
    adapter, base = handle.adapter, model.base_model
    for modality in dict.fromkeys(item.modality for item in handle._items):
        tower = getattr(base, f"{modality.name}_tower", None) or base.vision_tower
        pixels = next(inputs[name] for name in modality.pixels if name in inputs)
        states = _states(model, tower, pixels, inputs)
        width = states.shape[1] - adapter.n_prefix
        patches = states[:, adapter.n_prefix :].flatten(0, 1)
        owners = _patches(model, modality.name, pixels, inputs, width)
        items = [i for i in handle._items if i.modality == modality]
        first = len(made)
        for item, owner, selection in zip(
            items, owners, handle.selections[first : first + len(items)], strict=True
        ):
            tiles = (owner[owner >= 0] // width).unique()
            prefix = states[tiles, : adapter.n_prefix].flatten(0, 1)
            own = patches[owner.clamp(min=0)]
            rows = mixed(selection, torch.cat([own, prefix]))
            if not hasattr(model.config, "vision_feature_layer"):  # PaliGemma takes the tower's end
                rows = tower.post_layernorm(rows)
            rows = base.multi_modal_projector(rows[None])[0]
            plain = owner[selection.slots[0]] < 0
            rows[plain] = item.tokens[selection.slots[0][plain]]  # newlines are not made of patches
            made.append(rows)
    return made


def _states(model: Any, tower: Any, pixels: torch.Tensor, inputs: Any) -> torch.Tensor:
    layer = getattr(model.config, "vision_feature_layer", -1)
    if pixels.ndim == 5 and "image_sizes" in inputs and "pixel_values" in inputs:
        tiles = [int((image.flatten(1) != 0).any(1).sum()) for image in pixels]
        pixels = torch.cat([image[:n] for image, n in zip(pixels, tiles, strict=True)])
    elif pixels.ndim == 5:
        pixels = pixels.flatten(0, 1)
    seen: list[torch.Tensor] = []
    block = tower.encoder.layers[-1 if layer == -1 else len(tower.encoder.layers) + layer]
    with block.register_forward_hook(lambda module, args, output: seen.append(output)):
        tower(pixels)
    return seen[0]


def _patches(
    model: Any, name: str, pixels: torch.Tensor, inputs: Any, width: int
) -> list[torch.Tensor]:
    """Per item the patch that each of its tokens is made of, -1 = none."""
    if hasattr(model.base_model, "pack_image_features"):
        tiles = [int((image.flatten(1) != 0).any(1).sum()) for image in pixels]
        ids = torch.arange(sum(tiles) * width).float().view(-1, width, 1)
        packed, _ = model.base_model.pack_image_features(
            ids.split(tiles), inputs["image_sizes"], "default", image_newline=torch.tensor([-1.0])
        )
        return [item[:, 0].long() for item in packed]
    if name == "video":  # Video-LLaVA: [CLS] before the patches of each frame
        frames = torch.arange(pixels.shape[0] * pixels.shape[1] * width).view(-1, width)
        frames = torch.cat([frames.new_full((len(frames), 1), -1), frames], dim=1)
        return list(frames.view(len(pixels), -1))
    return list(torch.arange(len(pixels) * width).view(len(pixels), width))


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_keep_all_is_bit_identical(family, kind, site):
    strategy, keep = SITES[site]
    model, inputs = model_of(family)[0], inputs_of(family, kind)
    ids, logits = generate(model, inputs, STEPS)
    plain = model(**inputs).logits
    with vtprune.wrap(model, strategy, keep=[1.0] * 2 if isinstance(keep, list) else 1.0):
        kept_ids, kept_logits = generate(model, inputs, STEPS)
        assert torch.equal(ids, kept_ids)
        assert torch.equal(logits, kept_logits)
        assert torch.equal(plain, model(**inputs).logits)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_gather_equals_mask(family, kind, site):
    check(family, kind, site)


OPTIONS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "static": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "keep": {"positions": "keep"},
    "renumber": {"positions": "renumber"},
    "row": {"newlines": "row"},
}
# The combinations of the default suite; the rest of the matrix is slow.
QUICK = {(site, "sdpa") for site in ("projector", "decoder")}
WAYS = [
    pytest.param(
        *(site, option, attention),
        marks=[] if (site, attention) in QUICK else pytest.mark.slow,
    )
    for site in SITES
    for option in OPTIONS
    for attention in ("sdpa", "eager")
    if (option, attention) != ("as it comes", "sdpa")  # what the test above does
]


@pytest.mark.parametrize(("site", "option", "attention"), WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ways_of_calling(family, site, option, attention):
    options = OPTIONS[option]
    message = refused(family, site, options)
    if message is None:
        return check(family, "ragged", site, attention, **options)
    with pytest.raises(VTPruneError, match=message):
        check(family, "ragged", site, attention, **options)
