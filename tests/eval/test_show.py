from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from vtprune import ConfigError, UnsupportedError, wrap
from vtprune.eval import scenes, tiny
from vtprune.eval.samples import Asker
from vtprune.eval.show import (
    ask_and_draw,
    check_out,
    check_words,
    frames,
    kept_mask,
    normalize,
    open_image,
    what_is_seen,
)


@pytest.fixture(scope="module")
def scene():
    return scenes.make_scene(7)


@pytest.mark.parametrize("strategy", ["fastervlm", "divprune"])
def test_show_answers_and_draws(loaded, scene, tmp_path, strategy):
    out = tmp_path / "x.png"
    model, processor = loaded
    shown = ask_and_draw(model, processor, scene.image, "How many digits?", strategy, 64, out)
    assert shown.question == "how many digits ?"
    assert (shown.kept, shown.tokens) == (64, 256)
    with Image.open(out) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    assert pixels.shape[1] >= 1000
    left, right = np.array_split(pixels[80:-20].astype(float), 2, axis=1)
    assert right.mean() < 0.7 * left.mean()


def test_what_is_seen_is_the_image(loaded, scene):
    processor = loaded[1].image_processor
    pixels = processor(scene.image, return_tensors="pt")["pixel_values"]
    seen = what_is_seen(pixels, processor, scene.image)
    assert np.abs(seen * 255 - scene.pixels).max() < 1


def test_several_tiles_are_refused(loaded, scene):
    with pytest.raises(UnsupportedError, match="an image as one"):
        what_is_seen(torch.zeros(1, 5, 3, 8, 8), loaded[1].image_processor, scene.image)


@pytest.mark.parametrize(
    ("strategy", "kept"), [("divprune", 20), ("visionzip", 20), ("fastv", 20), ("pyramiddrop", 16)]
)
def test_kept_mask_is_what_leaves_the_last_layer(loaded, scene, strategy, kept):
    model, processor = loaded
    inputs = Asker(processor)(["how many digits ?"], [scene.image])
    with wrap(model, strategy, keep=20 if strategy != "pyramiddrop" else 0.5) as handle:
        model(**inputs)
        mask = kept_mask(handle, inputs["input_ids"])
    assert mask.shape == (16, 16)
    if strategy == "divprune":
        assert mask.reshape(-1).nonzero()[0].tolist() == handle.selections[0].rows[0].tolist()
    stages = handle.report().stages
    assert mask.sum() == (stages[-1].kept if stages else kept)


def test_wide_images_keep_their_grid(tmp_path):
    model, processor = tiny.build("qwen2_vl")
    image = Image.fromarray(np.full((56, 84, 3), 90, dtype=np.uint8))
    inputs = Asker(processor)(["a b"], [image])
    with wrap(model, "divprune", keep=3) as handle:
        model(**inputs)
        mask = kept_mask(handle, inputs["input_ids"])
    assert mask.shape[1] * 2 == mask.shape[0] * 3
    assert mask.sum() == 3
    assert what_is_seen(inputs["pixel_values"], processor.image_processor, image).shape[:2] == (
        56,
        84,
    )


def test_tokens_that_form_no_grid_are_refused():
    model, processor = tiny.build("llava_next")
    image = Image.fromarray(np.full((56, 84, 3), 90, dtype=np.uint8))
    inputs = Asker(processor)(["a b"], [image])
    with wrap(model, "divprune", keep=3) as handle:
        model(**inputs)
        with pytest.raises(UnsupportedError, match="form none"):
            kept_mask(handle, inputs["input_ids"])


def test_frames_enclose_a_single_patch():
    bright = np.zeros((4, 4), dtype=bool)
    bright[1, 2] = True
    lines = {tuple(sorted(line)) for line in frames(bright, (32, 32))}
    left, right, top, bottom = 15.5, 23.5, 7.5, 15.5
    assert lines == {
        ((left, top), (left, bottom)),
        ((right, top), (right, bottom)),
        ((left, top), (right, top)),
        ((left, bottom), (right, bottom)),
    }


@pytest.mark.parametrize("lenient", [False, True])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_truncated_images_are_named(scene, tmp_path, monkeypatch, kind, lenient):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)  # as lmms-eval does
    data = io.BytesIO()
    scene.image.save(data, kind)
    whole = data.getvalue()
    path = tmp_path / "broken.img"
    path.write_bytes(whole)
    assert open_image(path).size == (128, 128)
    for size in (0, 5, 60, len(whole) // 2, len(whole) - 30):
        path.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match=r"broken\.img cannot be read"):
            open_image(path)
        assert ImageFile.LOAD_TRUNCATED_IMAGES is lenient


def test_corrupt_and_missing_images_are_named(scene, tmp_path):
    data = io.BytesIO()
    scene.image.save(data, "PNG")
    broken = bytearray(data.getvalue())
    broken[len(broken) // 2] ^= 0xFF
    path = tmp_path / "corrupt.png"
    path.write_bytes(broken)
    with pytest.raises(ConfigError, match=r"corrupt\.png cannot be read"):
        open_image(path)
    path.write_text("no image at all")
    with pytest.raises(ConfigError, match="no image format"):
        open_image(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        open_image(tmp_path)
    with pytest.raises(ConfigError, match=r"no image file .*absent\.png"):
        open_image(tmp_path / "absent.png")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_color_modes_become_rgb(scene, tmp_path, mode):
    path = tmp_path / "image.tif"
    scene.image.convert(mode).save(path)
    assert open_image(path).mode == "RGB"


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("How many digits?", "how many digits ?"),
        ("how many digits ?", "how many digits ?"),
        ("  Is there\na 5??", "is there a 5 ?"),
        ("count", "count"),
    ],
)
def test_normalize(given, asked):
    assert normalize(given) == asked


def test_unknown_words_are_named(loaded):
    tokenizer = loaded[1].tokenizer
    check_words("how many digits ?", tokenizer)
    with pytest.raises(ConfigError, match=r"'zebras'.*knows: .*digits"):
        check_words("how many zebras ?", tokenizer)
    with pytest.raises(ConfigError, match="empty"):
        check_words("", tokenizer)


def test_out_is_checked(tmp_path):
    check_out(tmp_path / "x.png")
    with pytest.raises(ConfigError, match="png"):
        check_out(tmp_path / "x.doc")
    with pytest.raises(ConfigError, match="folder that can be written"):
        check_out(tmp_path / "none" / "x.png")
