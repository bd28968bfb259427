from __future__ import annotations

import hashlib
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import vtprune.eval
from vtprune import ConfigError
from vtprune.eval import shipped


@pytest.fixture
def copy(model_dir, tmp_path):
    return shutil.copytree(model_dir, tmp_path / "copy")


def test_half_precision_weights_load_in_float32(copy):
    weights = load_file(copy / "model.safetensors")
    half = {name: value.half() for name, value in weights.items()}
    save_file(half, copy / "model.safetensors", metadata={"format": "pt"})
    model, processor = shipped.load(str(copy))
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    name = "language_model.model.layers.3.mlp.up_proj.weight"
    found = next(v for k, v in half.items() if k.endswith(name.partition("model.")[2]))
    assert torch.equal(model.model.language_model.layers[3].mlp.up_proj.weight, found.float())
    assert processor.image_processor is not None


def test_a_shipped_name_is_a_folder_of_models(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "MODELS", tmp_path)
    path = shutil.copytree(model_dir, tmp_path / "mini-llava")
    seal(path)
    found = shipped.load()
    assert shipped.fingerprint(*found) == shipped.fingerprint(*shipped.load(str(model_dir)))


def seal(path):
    """Writes the sums as sha256sum does."""
    sums = (f"{hashlib.sha256(f.read_bytes()).hexdigest()}  {f.name}" for f in path.iterdir())
    (path / shipped.SUMS).write_text("\n".join(sorted(sums)) + "\n")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "chat_template.jinja"])
def test_a_changed_shipped_file_is_refused(model_dir, tmp_path, monkeypatch, file):
    monkeypatch.setattr(shipped, "MODELS", tmp_path)
    path = shutil.copytree(model_dir, tmp_path / "mini-llava")
    seal(path)
    shipped.verify("mini-llava")
    data = bytearray((path / file).read_bytes())
    data[-20] ^= 1
    (path / file).write_bytes(data)
    with pytest.raises(ConfigError, match=rf"{file} is not the file that was shipped"):
        shipped.load("mini-llava")
    shipped.load(str(model_dir))  # a directory elsewhere is its owner's business


def test_a_shipped_model_without_sums_is_refused(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "MODELS", tmp_path)
    shutil.copytree(model_dir, tmp_path / "mini-llava")
    with pytest.raises(ConfigError, match=r"lacks SHA256SUMS.*Install vtprune again"):
        shipped.load()


def test_every_file_of_a_shipped_model_is_summed():
    for name in shipped.names():
        path = shipped.MODELS / name
        summed = {line.split()[1] for line in (path / shipped.SUMS).read_text().splitlines()}
        prose = {shipped.SUMS, "README.md", "training_log.jsonl"}
        assert summed == {file.name for file in path.iterdir()} - prose
        assert sum(file.stat().st_size for file in path.iterdir()) < 12e6


def test_load_is_public():
    assert vtprune.eval.load is shipped.load


def test_an_unknown_name_gets_a_hint():
    with pytest.raises(ConfigError, match="Did you mean 'mini-llava'"):
        shipped.load("mini-lava")


@pytest.mark.parametrize(
    "name", ["./nothing", "/no/such/dir", "a/b/c", "~/nothing-here", "~nobody/x"]
)
def test_a_path_that_is_no_directory(name):
    with pytest.raises(ConfigError, match="is no directory"):
        shipped.load(name)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(copy, file):
    (copy / file).unlink()
    with pytest.raises(ConfigError, match=rf"lacks {file}"):
        shipped.load(str(copy))


def test_a_truncated_weights_file(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ConfigError, match="cannot be loaded"):
        shipped.load(str(copy))


def test_weights_that_lack_tensors_are_refused(copy):
    weights = load_file(copy / "model.safetensors")
    lost = next(name for name in weights if "projector" in name)
    del weights[lost]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="lack 1 tensors"):
        shipped.load(str(copy))


def test_fingerprint_tells_models_apart(loaded, model_dir):
    model, processor = shipped.load(str(model_dir))
    loaded[1].tokenizer(["how many", "how"], padding=True, truncation=True, max_length=1)
    whole = shipped.fingerprint(*loaded)
    assert shipped.fingerprint(model, processor) == whole
    processor.chat_template += " "
    assert shipped.fingerprint(model, processor) != whole
    processor.chat_template = loaded[1].chat_template
    model.config.vision_feature_layer = -1
    assert shipped.fingerprint(model, processor) != whole
    model.config.vision_feature_layer = -2
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert shipped.fingerprint(model, processor) != whole


@pytest.mark.parametrize("text", ["", "\n", "0123  model.safetensors\n"])
def test_sums_that_cover_nothing_are_refused(model_dir, tmp_path, monkeypatch, text):
    monkeypatch.setattr(shipped, "MODELS", tmp_path)
    path = shutil.copytree(model_dir, tmp_path / "mini-llava")
    (path / shipped.SUMS).write_text(text)
    with pytest.raises(ConfigError, match="is not the file that was shipped"):
        shipped.verify("mini-llava")


def test_a_summed_file_that_is_gone_is_named(model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "MODELS", tmp_path)
    path = shutil.copytree(model_dir, tmp_path / "mini-llava")
    seal(path)
    (path / "chat_template.jinja").unlink()
    with pytest.raises(ConfigError, match=r"lacks chat_template\.jinja"):
        shipped.load()


@pytest.mark.parametrize(("file", "text"), [("config.json", "[]"), ("processor_config.json", "[]")])
def test_damaged_files_are_one_error(copy, file, text):
    (copy / file).write_text(text)
    with pytest.raises(ConfigError, match="cannot be loaded"):
        shipped.load(str(copy))


def test_devices_and_dtypes(model_dir):
    model, _ = shipped.load(str(model_dir), dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="dtype='half'"):
        shipped.load(str(model_dir), dtype="half")
    with pytest.raises(ConfigError, match="device='abacus' cannot be used"):
        shipped.load(str(model_dir), device="abacus")
