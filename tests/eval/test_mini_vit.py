"""The ViT classifier: its size and start, what it is taught, saving and loading."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vtprune import ConfigError
from vtprune.eval import mini_llava, mini_vit, train_vit
from vtprune.eval.scene_objects import CLASSES, SIDE, class_of, make_picture
from vtprune.eval.scene_things import COLORS, NAMES, Thing
from vtprune.eval.train_data import IGNORE

timm = pytest.importorskip("timm")
GRID = mini_vit.GRID


@pytest.fixture(scope="module")
def model():
    """Untrained, with weights scaled up, so that answers depend on what is seen."""
    return scaled_up(mini_vit.build_model()).eval()


@torch.no_grad()
def scaled_up(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        std = 1.2 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.5
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model


def test_it_is_small_deep_and_has_a_cls(model):
    assert 4 * sum(p.numel() for p in model.parameters()) < 8e6
    assert len(model.blocks) == 12
    assert model.pos_embed.shape == (1, 1 + 196, 96)
    assert model.num_prefix_tokens == 1
    assert model(torch.zeros(2, 3, SIDE, SIDE)).shape == (2, len(CLASSES))


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ImportError, match=r"pip install 'vtprune\[vit\]'"):
        mini_vit.build_model()


@torch.no_grad()
def test_it_starts_as_the_tower():
    """The tower's own modules on the upper left of its positions give the same states."""
    tower, ours = scaled_up(mini_llava.build_model().model.vision_tower), mini_vit.build_model()
    head = ours.head.weight.clone()
    train_vit.inherit(ours, tower)
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    table = tower.embeddings.position_embedding.weight
    cells = [row * mini_llava.GRID + col for row in range(GRID) for col in range(GRID)]
    patches = tower.embeddings.patch_embedding(pixels).flatten(2).mT
    cls = tower.embeddings.class_embedding.expand(2, 1, -1)
    states = torch.cat([cls, patches], dim=1) + table[[0, *(1 + cell for cell in cells)]]
    states = tower.encoder(inputs_embeds=tower.pre_layrnorm(states)).last_hidden_state
    found = ours.eval().forward_features(pixels)
    torch.testing.assert_close(found, tower.post_layernorm(states), rtol=1e-4, atol=1e-4)
    assert torch.equal(ours.head.weight, head)


def test_a_batch_by_hand():
    shown = train_vit.shown(7, 2, crowd=40)
    picture = make_picture(8, "train", crowd=40)
    present = {class_of(t) for t in picture.things}
    assert set(shown.share[1].nonzero().flatten().tolist()) == present
    torch.testing.assert_close(shown.share.sum(1), torch.ones(2))
    pixels = torch.tensor(picture.pixels).permute(2, 0, 1)
    torch.testing.assert_close((shown.pixels[1] + 1) * 127.5, pixels.float(), atol=1e-3, rtol=0)
    alone = train_vit.shown(7, 2).share
    assert alone.argmax(-1).tolist() == [make_picture(i, "train").label for i in (7, 8)]
    assert alone.max() == 1


def test_token_targets_by_hand():
    """A square of 20 pixels from (8, 4) on covers rows 0 to 2 and columns 1 to 3, some in part."""
    square = Thing("square", "blue", 0, 0, 8, 4, 20)
    name, color = train_vit.token_targets((square,)).reshape(2, GRID, GRID)
    it = 1 + NAMES.index("square")
    assert name[:4, :5].tolist() == [
        [0, it, it, it, 0],
        [0, it, it, it, 0],
        [0, it, it, it, 0],
        [0, 0, 0, 0, 0],
    ]
    assert color[1, 1] == list(COLORS).index("blue")
    assert color[0, 0] == IGNORE
    edge = train_vit.token_targets((Thing("square", "blue", 0, 0, 7, 0, 16),))[0]
    assert edge.reshape(GRID, GRID)[0, :4].tolist() == [IGNORE, it, it, 0]


@torch.no_grad()
def test_a_stage_shows_its_pictures_and_is_about_the_logits(tmp_path):
    trainer = train_vit.VitTrainer(tmp_path, torch.device("cpu"))
    for stage, crowd in zip(train_vit.STAGES, (40, 1), strict=True):
        batch = trainer.show(stage, 4)(9, (SIDE, SIDE))
        assert torch.equal(batch.pixels, train_vit.shown(9, 4, crowd).pixels)
        values = trainer.losses(stage, batch)
        wanted = -(batch.share * trainer.model(batch.pixels).log_softmax(-1)).sum(-1).mean()
        assert float(values["class"]) == pytest.approx(float(wanted), abs=0.05)  # bfloat16


def test_readouts_are_asked_where_there_is_something():
    batch = train_vit.shown(0, 4, 40)
    thing, color = (
        50 * F.one_hot(targets.clamp(min=0), n)
        for targets, n in ((batch.thing, 15), (batch.color, 8))
    )
    thing[batch.thing == IGNORE] = color[batch.color == IGNORE] = -50
    heads: Any = SimpleNamespace(thing=lambda tokens: thing, color=lambda tokens: color)
    values = train_vit.token_losses(heads, torch.zeros(4, 196, 96), batch)
    assert float(values["thing"]) < 1e-6 > float(values["color"])
    assert values["thing_acc"] == 1
    color[0, int(batch.color[0].argmax())] = 0
    thing[0, int(batch.thing[0].argmax())] = 0
    values = train_vit.token_losses(heads, torch.zeros(4, 196, 96), batch)
    assert float(values["thing"]) > 1e-3 < float(values["color"])


def test_what_is_saved_is_loaded_here_and_by_timm(model, tmp_path):
    mini_vit.save(model, tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 8e6
    pixels = mini_vit.preprocess([make_picture(i) for i in range(2)])
    wanted = model(pixels)
    assert torch.equal(mini_vit.load(tmp_path)(pixels), wanted)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(theirs(pixels), wanted)
    assert list(theirs.pretrained_cfg["mean"]) == [0.5] * 3


def test_what_cannot_be_loaded(model, tmp_path):
    with pytest.raises(ConfigError, match=r"lacks config\.json, model\.safetensors"):
        mini_vit.load(tmp_path)
    mini_vit.save(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model_args"]["depth"] = 11
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="cannot be loaded: Error"):
        mini_vit.load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        mini_vit.load(tmp_path)


def test_right_counts_answers(model):
    n, pictures = 5, [make_picture(i) for i in range(5)]
    answers = model(mini_vit.preprocess(pictures)).argmax(-1).tolist()
    assert mini_vit.right(model, n, batch=2) == [
        answer == picture.label for answer, picture in zip(answers, pictures, strict=True)
    ]

    class Knowing(torch.nn.Linear):
        def forward(self, input):
            labels = [make_picture(self.seen + i).label for i in range(len(input))]
            self.seen += len(input)
            return F.one_hot(torch.tensor(labels), len(CLASSES)).float()

    knowing = Knowing(1, 1)
    knowing.seen = 0
    assert mini_vit.right(knowing, n, batch=2) == [True] * n
