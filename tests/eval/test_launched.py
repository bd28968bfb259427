"""What a process learns of the launcher that started it, and what the command line makes of it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from typer.testing import CliRunner

from tests.eval.test_ranks import world
from vtprune import ConfigError
from vtprune.eval.cli import app
from vtprune.eval.ranks import Ranks, distributed


def test_one_process_needs_no_launcher(monkeypatch):
    for value in (None, "1"):
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        if value:
            monkeypatch.setenv("WORLD_SIZE", value)
        ranks = Ranks.join()
        assert (ranks.rank, ranks.world, ranks.first) == (0, 1, True)
        assert ranks.device("cuda") == "cuda"
        assert [ranks.count(2), ranks.count(3)] == [2, 5]


@pytest.mark.parametrize(
    "given",
    [
        {"WORLD_SIZE": "2"},
        {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"},
        {"WORLD_SIZE": "two", "RANK": "0", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "x"},
        {"WORLD_SIZE": "2", "RANK": "0", "TORCHELASTIC_RUN_ID": "x"},
    ],
)
def test_processes_that_no_launcher_watches_are_refused(monkeypatch, given):
    for name in ("RANK", "LOCAL_RANK", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"not by torchrun.*torchrun --nproc_per_node 2"):
        Ranks.join()


def test_each_rank_has_its_gpu(monkeypatch):
    first, second, third = world(3)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert [first.device("cuda"), second.device("cuda")] == ["cuda:0", "cuda:1"]
    assert chosen == [0, 1]
    assert [second.device("cpu"), second.device("cuda:0")] == ["cpu", "cuda:0"]
    with pytest.raises(ConfigError, match="Rank 2 has no GPU: here are 2"):
        third.device("cuda")


def test_an_error_of_all_is_told_once():
    told = []
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda ranks: ranks.once(lambda: told.append(ranks.rank)), world(3)))
    assert len(told) == 1


def test_a_lost_launcher_is_said():
    server = distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    store = distributed.TCPStore("localhost", server.port, is_master=False)
    ranks = Ranks(1, 2, 1, store)
    assert ranks.count(1) == 1
    del server
    for ask in (lambda: ranks.count(1), lambda: ranks.meet("measured")):
        with pytest.raises(ConfigError, match="Rank 1 has lost the launcher"):
            ask()
    told = []
    ranks.once(lambda: told.append(1))
    assert told == [1]


@pytest.mark.parametrize("command", ["list", "doctor", "show", "scenes"])
def test_other_commands_are_refused(monkeypatch, command):
    monkeypatch.setattr(Ranks, "join", lambda: world(2)[0])
    result = CliRunner().invoke(app, [command])
    assert result.exit_code == 2
    assert f"vtprune {command} runs in one process; only sweep" in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_the_command_that_resumes_starts_as_many(monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Ranks, "join", lambda: world(3)[0])
    monkeypatch.setattr("vtprune.eval.shipped.load", interrupted)
    result = CliRunner().invoke(app, ["sweep", "--limit", "2"])
    assert result.exit_code == 130
    assert "\ntorchrun --nproc_per_node 3 -m vtprune.eval sweep --model mini-llava" in result.output
