"""Strategies that compute less: their layers, their rules, and what they refuse."""

from __future__ import annotations

import dataclasses

import pytest

from tests.contracts.bank import TOWERS
from vtprune.errors import ConfigError
from vtprune.registry import build
from vtprune.rules import RowRule
from vtprune.strategies.shortv import FILE, LLAVA, NEXT, authors, placed
from vtprune.strategies.zipvl import ZipVL


def facts_of(depth: int, family: str = "LLaVA-1.5"):
    return dataclasses.replace(TOWERS["with CLS"], decoder_layers=depth, family=family)


def layers_of(depth: int, **options) -> tuple[int, ...]:
    return build("shortv", **options).used_layers(facts_of(depth))


def test_shortv_replaces_the_authors_layers():
    assert layers_of(32) == tuple(sorted(LLAVA[32]))
    assert layers_of(40) == tuple(sorted(LLAVA[40]))
    assert layers_of(40, order=LLAVA[40][::-1], replaced=2) == (17, 20)
    for orders in (LLAVA, NEXT):
        assert [len(set(orders[depth])) for depth in (32, 40)] == [19, 24]
    assert layers_of(32, replaced=3) == (29, 30, 31)
    assert layers_of(40, replaced=0.1) == (28, 32, 36, 39)
    assert layers_of(32, layers=(4, 5)) == (4, 5)


@pytest.mark.parametrize("depth", [1, 2, 4, 12, 24, 28, 36, 48, 64, 80])
def test_other_depths_take_the_place_of_the_nearest_layer(depth):
    ranked = placed(*authors(facts_of(depth)), depth)
    if depth <= 32:
        assert depth == 1 or ranked[0] == depth - 1  # of one layer only the first is known
    assert len(set(ranked)) == len(ranked)
    assert 0 in ranked
    assert abs(len(layers_of(depth)) - 0.6 * depth) < 0.05 * depth + 1


def test_a_model_of_another_depth_keeps_the_authors_share():
    assert len(layers_of(12)) == 7
    assert placed(LLAVA[32], 32, 12)[:3] == (11, 10, 0)
    assert len(layers_of(64, replaced=0.5)) == 32


@pytest.mark.parametrize("replaced", [0, -1, 0.0, 1.5, True, float("nan"), "3"])
def test_a_number_of_layers_that_is_none(replaced):
    with pytest.raises(ConfigError, match="neither a number of layers from 1 on nor a share"):
        build("shortv", replaced=replaced)


def test_more_layers_than_the_authors_ordered():
    with pytest.raises(
        ConfigError, match=r"replaced=0\.9: of these 32 layers only 19 have an order"
    ):
        layers_of(32, replaced=0.9)
    assert layers_of(32, replaced=0.9, layers=(1,)) == (1,)


def test_next_has_an_order_of_its_own_where_the_authors_measured_it():
    assert authors(facts_of(40, "LLaVA-NeXT (clip_vision_model)")) == (NEXT[40], 40)
    assert authors(facts_of(32, "LLaVA-NeXT-Video (clip_vision_model)")) == (NEXT[32], 32)
    assert authors(facts_of(28, "LLaVA-NeXT (clip_vision_model)")) == (LLAVA[32], 32)


def test_an_order_beside_the_model_is_its_own(tmp_path):
    bare = build("shortv", replaced=2)
    assert bare.beside(str(tmp_path)) == bare == bare.beside("")
    (tmp_path / FILE).write_text('{"order": [3, 1, 0, 2]}')
    ours = bare.beside(str(tmp_path))
    assert ours.used_layers(facts_of(4)) == (1, 3)
    given = build("shortv", order=(0, 1))
    assert given.beside(str(tmp_path)) == given
    with pytest.raises(
        ConfigError, match=r"order= names layers \[3, 2\]; LLaVA-1.5 has 2. It is of"
    ):
        ours.used_layers(facts_of(2))
    for text in ("{", '{"order": 3}', "{}", '{"order": ["a"]}'):
        (tmp_path / FILE).write_text(text)
        with pytest.raises(ConfigError, match=r"shortv.json holds no order of layers. Write it"):
            bare.beside(str(tmp_path))


def rule_of(name: str, layer: int = 0, depth: int = 32, **options) -> RowRule:
    rule = build(name, **options).plan(facts_of(depth))[layer].rule
    assert isinstance(rule, RowRule)
    return rule


def test_what_visual_rows_do():
    assert rule_of("shortv") == RowRule(attend="none", mlp=0.0)
    assert rule_of("naavit") == RowRule(attend="none")
    assert rule_of("naavit", mlp=False) == rule_of("shortv")
    assert rule_of("eemllm") == RowRule(attend="self")
    assert rule_of("eemllm", visual_rows="ffn") == rule_of("naavit")
    assert rule_of("yopo") == RowRule(attend="window", radius=2)
    assert rule_of("yopo", 15) == rule_of("yopo")
    chosen = RowRule(attend="chosen", chooser=ZipVL(tau=0.96), others="drop", every=100)
    assert rule_of("zipvl", 0, tau=0.96) == rule_of("zipvl", 31, tau=0.96) == chosen
    assert rule_of("yopo", 16) == RowRule(attend="window", radius=2, read=False)
    assert rule_of("yopo", window=None, layercut=0, mlp_ratio=4) == RowRule(mlp=0.25, read=False)


@pytest.mark.parametrize(("window", "radius"), [(1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (6, 2)])
def test_an_even_window_is_one_less(window, radius):
    assert rule_of("yopo", window=window).radius == radius


def test_with_renorm_visual_tokens_leave_where_they_are_no_longer_read():
    stages = build("yopo", renorm=True).plan(facts_of(12))
    assert [stage.layer for stage in stages] == list(range(7))
    assert [stage.rule is None for stage in stages] == [False] * 6 + [True]
    for layercut in (0, 12):
        with pytest.raises(ConfigError, match="lets them leave before layers 1 to 11"):
            build("yopo", renorm=True, layercut=layercut).plan(facts_of(12))


def test_heads_are_those_of_each_layer():
    heads = ((0, 1), (1,))
    assert [rule_of("yopo", i, 2, heads=heads).heads for i in range(2)] == [(0, 1), (1,)]
    with pytest.raises(ConfigError, match=r"heads= has 2 layers; .* has 32"):
        rule_of("yopo", heads=heads)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("eemllm", {"visual_rows": "freeze"}, "visual_rows='freeze' is unknown; choose 'self"),
        ("zipvl", {"tau": 0}, "tau=0 is no share of attention"),
        ("zipvl", {"others": "forget"}, "others='forget' is unknown"),
        ("zipvl", {"bits": (16, 2)}, r"bits=\(16, 2\): give those"),
        ("yopo", {"window": 0}, "window=0 sees nothing"),
        ("yopo", {"mlp_ratio": 0.5}, r"mlp_ratio=0\.5 must be at least 1"),
        ("yopo", {"layercut": -1}, "layercut=-1 is no layer"),
    ],
)
def test_options_out_of_range(name, options, message):
    with pytest.raises(ConfigError, match=message):
        build(name, **options)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"attend": "some"}, "attend='some' is unknown; choose one of 'all', 'window'"),
        ({"mlp": 1.5}, r"mlp=1\.5 is no share"),
        ({"mlp": float("nan")}, "mlp=nan is no share"),
        ({"radius": -1}, "radius=-1 must be at least 0"),
        ({"attend": "chosen"}, "attend='chosen' and a chooser go together"),
        ({"chooser": ZipVL()}, "attend='all' with chooser=ZipVL"),
        ({"others": "drop"}, "others='drop' are those not chosen; give a chooser too"),
        ({"others": "leave"}, "others='leave' is unknown; choose one of 'keep', 'drop', 'pack'"),
        ({"bits": (4, 3)}, r"bits=\(4, 3\): give those of chosen and of other tokens"),
        ({"bits": (4,)}, r"bits=\(4,\): give those"),
        ({"bits": 4}, "bits=4: give those"),
        ({"bits": (4, 2.0)}, r"bits=\(4, 2\.0\): give those"),
        ({"every": 0}, "every=0 is no number of tokens; give 1 or more"),
        ({"every": True}, "every=True is no number"),
        ({"every": 2.5}, r"every=2\.5 is no number"),
    ],
)
def test_a_rule_out_of_range(rule, message):
    with pytest.raises(ConfigError, match=message):
        RowRule(**rule)


def test_the_published_costs_of_a_visual_token():
    """MAC of 7B at 576 tokens: the whole layer, keys and values alone, those and the MLP."""
    d, m, n = 4096, 11008, 576
    assert RowRule().macs(n, d, m) / n == pytest.approx(207.1e6, rel=1e-3)
    assert rule_of("shortv").macs(n, d, m) / n == pytest.approx(33.6e6, rel=2e-3)
    assert rule_of("naavit").macs(n, d, m) / n == pytest.approx(168.8e6, rel=1e-3)
    quarter = rule_of("yopo", mlp_ratio=2, heads=tuple([tuple(range(24))] * 32))
    linear = quarter.macs(n, d, m, heads=32) - n * 2 * 25 * d
    assert linear / n == pytest.approx(0.75 * 67.1e6 + 67.6e6, rel=1e-3)


def test_rules_in_words():
    assert str(RowRule()) == "as ever"
    assert str(rule_of("shortv")) == "no attention, no MLP"
    rule = RowRule(attend="window", mlp=0.5, radius=2, heads=(0,), read=False)
    assert str(rule_of("eemllm")) == "attend to themselves alone"
    assert str(rule) == "attend within 5 x 5, 0.5 of the MLP, 1 key/value heads, values unread"
