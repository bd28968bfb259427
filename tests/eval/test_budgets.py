from __future__ import annotations

import pytest

from vtprune import ConfigError
from vtprune.eval import budgets
from vtprune.eval.budgets import CEILING, FLOOR, Point, parse_keep, points, split

READ = [
    ("100%", 1.0),
    ("50%", 0.5),
    ("12.5%", 0.125),
    ("6.25 %", 0.0625),
    ("0.25", 0.25),
    (".5", 0.5),
    ("1.0", 1.0),
    ("64", 64),
    ("1", 1),
    (" 2 ", 2),
]
BAD = [
    "",
    "0",
    "0%",
    "0.0",
    "-1",
    "-5%",
    "1.5",
    "101%",
    "many",
    "25%%",
    "nan",
    "inf",
    "1e2",
    "True",
]


@pytest.mark.parametrize(("text", "keep"), READ)
def test_parse_keep(text, keep):
    found = parse_keep(text)
    assert found == keep
    assert type(found) is type(keep)


@pytest.mark.parametrize("text", BAD)
def test_a_bad_budget_is_named(text):
    with pytest.raises(ConfigError, match="Budget") as caught:
        parse_keep(text)
    assert repr(text) in str(caught.value)


def test_points_measure_keep_all_once():
    found = points(["random", "divprune"], ["100%", "25%", "1"])
    pairs = [("random", "25%"), ("random", "1"), ("divprune", "25%"), ("divprune", "1")]
    assert found == [CEILING, FLOOR, *(Point(*pair) for pair in pairs)]


def test_points_of_all_strategies():
    names = {point.strategy for point in points(["all"], ["25%"])}
    assert names >= {*budgets.STRATEGIES, "unpruned", "blind"}


@pytest.mark.parametrize(
    ("names", "keeps", "said"),
    [
        (["fastvlm"], ["25%"], "Did you mean 'fastervlm'"),
        ([], ["25%"], "No strategy"),
        (["random"], [], "No budget"),
        (["random"], ["half"], "'half'"),
    ],
)
def test_bad_points(names, keeps, said):
    with pytest.raises(ConfigError, match=said):
        points(names, keeps)


def test_split_drops_repeats_and_blanks():
    assert split(" a, b,,a ,c") == ("a", "b", "c")


def test_split_leaves_what_is_in_brackets_whole():
    assert split("a(x=((0,),(1,)),y=[2,3]),b") == ("a(x=((0,),(1,)),y=[2,3])", "b")


def test_points_of_one_strategy_with_several_options():
    found = points(["zipvl(tau=0.9)", "zipvl( tau=0.90 )", "fastv(layers=(2,))"], ["25%"])
    named = [("zipvl(tau=0.9)", "100%"), ("fastv(layers=(2,))", "25%")]
    assert found[2:] == [Point(*pair) for pair in named]
