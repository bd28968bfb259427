"""Finding strategies by name: scanning, entry points, and what goes wrong with names."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import vtprune
import vtprune.strategies
from vtprune.errors import ConfigError
from vtprune.registry import (
    adapter_classes,
    build,
    keeping_names,
    read,
    spell,
    strategy_class,
    strategy_names,
)
from vtprune.strategies.divprune import DivPrune
from vtprune.types import Signals

LAST_TOKENS = '''
"""Keeps the last tokens: a baseline."""

from dataclasses import dataclass

import torch

from vtprune.types import Signals, Strategy


@dataclass(frozen=True)
class LastTokens(Strategy):
    """``gain``: factor of the score."""

    gain: float = 1.0

    def score(self, signals: Signals) -> torch.Tensor:
        order = torch.arange(signals.n, dtype=torch.float32)
        return (self.gain * order).expand(len(signals.tokens), -1)
'''


@pytest.fixture(autouse=True)
def forget_new_modules() -> Iterator[None]:
    """Unloads the files that a test has written, so that the next one finds its own."""
    yield
    for name in [n for n in sys.modules if n.endswith(".last_tokens") or n.startswith("foreign_")]:
        del sys.modules[name]


@pytest.fixture
def drop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Writes a file into a new folder of strategies."""
    folder = tmp_path / "strategies"
    folder.mkdir()
    path = [*vtprune.strategies.__path__, str(folder)]
    monkeypatch.setattr(vtprune.strategies, "__path__", path)

    def write(name: str, text: str) -> None:
        (folder / f"{name}.py").write_text(text)

    return write


def announce(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: str, text: str
) -> None:
    """Installs a distribution with one entry point into ``folder``."""
    (folder / f"{module}.py").write_text(text)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[vtprune.strategies]\n{name} = {module}\n")
    monkeypatch.syspath_prepend(folder)


def test_the_names_are_those_of_the_files() -> None:
    folder = Path(vtprune.strategies.__path__[0])
    assert strategy_names() == sorted(p.stem for p in folder.glob("[!_]*.py"))
    assert {"divprune", "fastervlm", "random", "strided"} <= set(strategy_names())


def test_some_strategies_keep_no_number_of_tokens() -> None:
    without = set(strategy_names()) - set(keeping_names())
    classes = {name: strategy_class(name) for name in without}
    assert {cls.kind for cls in classes.values() if not cls.trained} == {"cache", "compute"}
    assert {"dynamicvit", "dyvte", "shortv", "yopo"} <= without


@pytest.mark.parametrize("name", strategy_names())
def test_every_strategy_builds_with_its_defaults(name: str) -> None:
    strategy = build(name)
    assert strategy.name == name
    assert isinstance(strategy, strategy_class(name))


def test_options_become_fields_and_an_instance_stays_itself() -> None:
    assert build("random", seed=3) == strategy_class("random")(seed=3)  # type: ignore[call-arg]
    strategy = DivPrune()
    assert build(strategy) is strategy


@pytest.mark.parametrize(
    ("given", "hint"),
    [("faster-vlm", "Did you mean 'fastervlm'?"), ("DivPrune", "Did you mean 'divprune'?")],
)
def test_an_unknown_strategy(given: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build(given)
    message = str(caught.value)
    assert f"Unknown strategy {given!r}. {hint} Known: {strategy_names()[0]}, " in message
    with pytest.raises(ConfigError, match="Unknown strategy"):
        vtprune.select(given, keep=1, signals=Signals(torch.ones(1, 4, 2)))


def test_a_name_like_no_other_gets_no_hint() -> None:
    with pytest.raises(ConfigError, match=r"Unknown strategy 'xyzzy'\. Known: "):
        build("xyzzy")


def test_an_unknown_option() -> None:
    with pytest.raises(ConfigError, match=r"option of random 'sead'\. Did you mean 'seed'"):
        build("random", sead=3)


def test_options_beside_an_instance_and_other_things() -> None:
    with pytest.raises(ConfigError, match="seed: set options on the instance"):
        build(DivPrune(), seed=1)
    with pytest.raises(ConfigError, match="neither a name nor a Strategy"):
        build(DivPrune)  # type: ignore[arg-type]


def test_a_new_file_is_all_that_a_new_strategy_takes(drop: Callable[[str, str], None]) -> None:
    assert "last_tokens" not in strategy_names()
    drop("last_tokens", LAST_TOKENS)
    drop("_helper", "raise RuntimeError('private files are not looked at')")
    assert "last_tokens" in strategy_names()
    assert "_helper" not in strategy_names()
    signals = Signals(torch.ones(2, 6, 3))
    selection = vtprune.select("last_tokens", keep=2, signals=signals)
    assert selection.rows.tolist() == [[4, 5]] * 2
    assert vtprune.select("last_tokens", keep=2, gain=-1.0, signals=signals).rows[0, 0] == 0
    assert (
        repr(build("last_tokens", gain=2.0))
        == "LastTokens(layers=None, exclude_sinks=False, gain=2.0)"
    )


def test_a_file_without_a_strategy(drop: Callable[[str, str], None]) -> None:
    drop("last_tokens", "from vtprune.strategies.divprune import DivPrune\n")
    with pytest.raises(ConfigError, match="exactly one Strategy, not 0"):
        build("last_tokens")


def test_two_strategies_in_one_file(drop: Callable[[str, str], None]) -> None:
    drop("last_tokens", LAST_TOKENS + "\n\nclass Another(LastTokens): ...\n")
    with pytest.raises(ConfigError, match="exactly one Strategy, not 2"):
        build("last_tokens")


def test_an_error_in_a_file_is_not_swallowed(drop: Callable[[str, str], None]) -> None:
    drop("last_tokens", "import nothing_of_this_name\n")
    assert "last_tokens" in strategy_names()
    with pytest.raises(ModuleNotFoundError, match="nothing_of_this_name"):
        build("last_tokens")


def test_another_package_announces_a_strategy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce(tmp_path, monkeypatch, "foreign_tokens", "foreign_tokens", LAST_TOKENS)
    assert "foreign_tokens" in strategy_names()
    selection = vtprune.select("foreign_tokens", keep=1, signals=Signals(torch.ones(1, 4, 2)))
    assert selection.rows.tolist() == [[3]]


def test_a_name_that_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    announce(tmp_path, monkeypatch, "divprune", "foreign_divprune", LAST_TOKENS)
    with pytest.raises(ConfigError, match=r"'divprune' is defined twice: .* and foreign_divprune"):
        strategy_names()


def test_every_adapter_serves_a_class() -> None:
    served = [cls for adapter in adapter_classes() for cls in adapter.classes]
    assert "LlavaForConditionalGeneration" in served
    assert len(set(served)) == len(served)


@pytest.mark.parametrize(
    ("text", "name", "options", "spelled"),
    [
        ("zipvl", "zipvl", {}, "zipvl"),
        (" zipvl ( tau = 0.96 ) ", "zipvl", {"tau": 0.96}, "zipvl(tau=0.96)"),
        ("fastv()", "fastv", {}, "fastv"),
        (
            "yopo(layers=(3,), heads=((0,), (1, 2)), window=None)",
            "yopo",
            {"layers": (3,), "heads": ((0,), (1, 2)), "window": None},
            "yopo(layers=(3,), heads=((0,), (1, 2)), window=None)",
        ),
    ],
)
def test_a_strategy_is_written_with_options(text, name, options, spelled):
    assert read(text) == (name, options)
    assert spell(text) == spelled
    assert read(spelled) == (name, options)


@pytest.mark.parametrize(
    "text", ["zipvl(0.96)", "zipvl(tau=", "zipvl(tau=open('x'))", "a.b(c=1)", "f(a=1) + 2", "(1,)"]
)
def test_a_strategy_written_in_another_way_is_refused(text):
    with pytest.raises(ConfigError, match=r"is not understood. Write .* zipvl\(tau=0.96\)"):
        build(text)


def test_options_are_read_like_those_beside_the_name():
    assert build("zipvl(tau=0.96)") == build("zipvl", tau=0.96)
    assert build("fastv(layers=(3,))") == build("fastv", layers=(3,))
    with pytest.raises(ConfigError, match=r"Unknown option of zipvl.* 'tao'. Did you mean 'tau'"):
        build("zipvl(tao=0.96)")
    with pytest.raises(ConfigError, match="tau: given twice"):
        build("zipvl(tau=0.96)", tau=0.9)
