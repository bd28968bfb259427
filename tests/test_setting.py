"""Settings in files: reading, writing, what is refused, and what ``wrap`` makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vtprune
from tests import tiny
from vtprune.errors import ConfigError
from vtprune.registry import build, read
from vtprune.setting import Setting, is_setting, read_setting

WHOLE = Setting(
    "vscan",
    {"layers": (1, 2), "positions": None},
    keep=0.25,
    measured={"model": "ours", "drop": 0.3, "bounds": (1, 2.5), "held": True},
)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def written(text: str, name: str = "tuned.yaml") -> Path:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return tmp_path / name

    return written


@pytest.mark.parametrize(
    "setting",
    [
        WHOLE,
        Setting("random", keep=64),
        Setting("tome", reduce=8),
        Setting("evit", reduce=0.5),
        Setting("shortv", {"replaced": 4, "order": (3, 1, 2)}),
        Setting("saisa", {"projectors": "a: 'file', with \"marks\" é"}),
    ],
    ids=lambda setting: setting.strategy,
)
def test_what_is_written_is_read_back(write: Any, setting: Setting) -> None:
    assert read_setting(write(setting.text())) == setting


def test_what_is_empty_is_not_written() -> None:
    assert Setting("random", keep=64).text() == "strategy: random\nkeep: 64\n"


def test_it_is_spelled_as_the_command_line_takes_it() -> None:
    spelled = Setting("shortv", {"replaced": 0.5, "order": (1, 2)}).spelled
    assert read(spelled) == ("shortv", {"replaced": 0.5, "order": (1, 2)})
    assert build(spelled) == build("shortv", replaced=0.5, order=(1, 2))


def test_what_is_a_file() -> None:
    assert is_setting(Path("x")) and is_setting("a/b.yaml") and is_setting("b.yml")
    assert not any(map(is_setting, ("random", "zipvl(tau=0.9)", build("random"), ["a.yaml"])))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("strategy: random\nkep: 64\n", "Unknown key 'kep'. Did you mean 'keep'"),
        ("keep: 64\n", "strategy is None"),
        ("strategy: [random, tome]\nkeep: 64\n", "strategy is ['random', 'tome']"),
        ("strategy: zipvl(tau=0.9)\n", "stands under options"),
        ("strategy: random\nkeep: 0\n", "keep=0 keeps nothing"),
        ("strategy: random\nkeep: 25%\n", "keep='25%' is not a budget"),
        ("strategy: random\nkeep: yes\n", "keep=True is not a budget"),
        ("strategy: random\nkeep:\n", "keep=None is not a budget"),
        ("strategy: random\nkeep: .nan\n", "keep=nan is not a share"),
        ("strategy: tome\nreduce: 0\n", "reduce=0 is not known"),
        ("strategy: tome\nreduce: 1.5\n", "reduce=1.5 is not known"),
        ("strategy: tome\nreduce: true\n", "reduce=True is not known"),
        ("strategy: tome\nreduce: 8\nkeep: 0.5\n", "both say what stays"),
        ("strategy: random\nkeep: 64\nkeep: 32\n", "keep twice"),
        ("strategy: random\nkeep: 1\noptions: 3\n", "options is 3"),
        ("strategy: random\nkeep: 1\noptions: {1: 2}\n", "options is {1: 2}"),
        ("strategy: random\nkeep: 1\noptions: {seed: .inf}\n", "options, seed: inf is no number"),
        ("strategy: random\nkeep: 1\noptions: {seed: {a: 1}}\n", "options, seed: {'a': 1}"),
        ("strategy: random\nkeep: 1\nmeasured: [1]\n", "measured is [1]"),
        ("strategy: random\nkeep: 1\nmeasured: {on: 2026-01-01}\n", "measured"),
        ("strategy: [random\n", "damaged or no YAML"),
        ("strategy: !!python/object/apply:os.getcwd []\n", "damaged or no YAML"),
        ("? [a, b]\n: 1\n", "damaged or no YAML"),
        ("? {a: b}\n: 1\n", "damaged or no YAML"),
        ("", "holds no setting"),
        ("- strategy\n", "holds no setting"),
    ],
)
def test_what_is_refused(write: Any, text: str, said: str) -> None:
    file = write(text)
    with pytest.raises(ConfigError) as caught:
        read_setting(file)
    assert said in str(caught.value)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_none(write: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tuned\.txt is no file of a setting"):
        read_setting(write("strategy: random\nkeep: 1\n", "tuned.txt"))
    with pytest.raises(ConfigError, match=r"absent.yaml cannot be read: No such file"):
        read_setting(tmp_path / "absent.yaml")
    (tmp_path / "folder.yaml").mkdir()
    with pytest.raises(ConfigError, match=r"folder.yaml cannot be read"):
        read_setting(tmp_path / "folder.yaml")
    (tmp_path / "bytes.yaml").write_bytes(b"strategy: \xff\xfe")
    with pytest.raises(ConfigError, match="damaged or no YAML"):
        read_setting(tmp_path / "bytes.yaml")


CASES = [
    (Setting("fastervlm", keep=0.25), {"keep": 0.25}),
    (Setting("visionzip", keep=5), {"keep": 5}),
    (Setting("divprune", {}, keep=3, measured={"model": "another"}), {"keep": 3}),
    (Setting("hiprune", {"alpha": 0.5, "layers": (0, 1)}, keep=4), {"keep": 4}),
    (Setting("shortv", {"replaced": 1}), {}),
]


@pytest.mark.parametrize(("setting", "budget"), CASES, ids=lambda c: getattr(c, "strategy", ""))
def test_wrap_takes_the_file_for_the_words(write: Any, setting: Setting, budget: Any) -> None:
    model, file = tiny.build(), write(setting.text())
    inputs, kept = tiny.ragged(), []
    for given, said in (
        (file, {}),
        (str(file), {}),
        (setting.strategy, dict(setting.options) | budget),
    ):
        with vtprune.wrap(model, given, **said) as handle, torch.no_grad():
            logits = model(**inputs).logits
            kept.append((handle.steps, logits))
    assert kept[0][0] == kept[1][0] == kept[2][0]
    assert torch.equal(kept[0][1], kept[2][1]) and torch.equal(kept[1][1], kept[2][1])


@pytest.mark.parametrize(
    "beside", [{"keep": 8}, {"reduce": 8}, {"layers": (1,)}, {"alpha": 0.2}, {"seed": 0}]
)
def test_nothing_is_said_twice(write: Any, beside: dict[str, Any]) -> None:
    file = write(Setting("hiprune", keep=4).text())
    with pytest.raises(ConfigError, match=f"{next(iter(beside))}: .*tuned.yaml says"):
        vtprune.wrap(tiny.build(), file, **beside)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        (Setting("hipprune", keep=4), "Did you mean 'hiprune'"),
        (Setting("hiprune", {"gamma": 1}, keep=4), "option of hiprune 'gamma'"),
        (Setting("hiprune"), "keep is missing"),
        (Setting("shortv", keep=4), "shortv lets no token leave"),
        (Setting("hiprune", keep=400), "keep=400"),
        (Setting("tome", reduce=8), "for merging inside a ViT"),
    ],
)
def test_what_wrap_refuses_it_refuses_from_a_file(write: Any, setting: Setting, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        vtprune.wrap(tiny.build(), write(setting.text()))
