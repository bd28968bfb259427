"""The processes that share a sweep, as torchrun or ``accelerate launch`` started them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed

from vtprune.errors import ConfigError

T = TypeVar("T")
distributed: Any = torch.distributed  # type checkers do not see its documented stores
NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
PAUSE = 0.1  # seconds between two looks at whether the others have come


class Ranks:
    """This process among those of its run, numbered from 0.

    They tell each other little, by the launcher's key-value store: no process group is made, so
    that model code sees a single process. A rank that waits for one that died does not wait for
    long: the launcher ends all when one has failed.
    """

    def __init__(self, rank: int, world: int, local: int, store: Any) -> None:
        """``local`` is the number of this process on its machine, ``store`` one of torch's."""
        self.rank, self.world, self.local = rank, world, local
        self._store = distributed.PrefixStore("vtprune", store)

    @classmethod
    def alone(cls) -> Ranks:
        """Returns one process by itself."""
        return cls(0, 1, 0, distributed.HashStore())

    @classmethod
    def join(cls) -> Ranks:
        """Returns this process among those that its launcher started with it.

        Raises:
            ConfigError: several processes are announced, but not by a launcher that ends the
                others when one dies.
        """
        if os.environ.get("WORLD_SIZE", "1") == "1":
            return cls.alone()
        try:
            rank, world, local = (int(os.environ[name]) for name in NAMES)
            if not distributed.is_torchelastic_launched():
                raise ValueError
        except (KeyError, ValueError):
            raise ConfigError(
                f"WORLD_SIZE={os.environ['WORLD_SIZE']} is set, but not by torchrun or accelerate "
                "launch. Start several processes as 'torchrun --nproc_per_node 2 -m vtprune.eval "
                "sweep ...', or unset WORLD_SIZE for one."
            ) from None
        store, _, _ = next(distributed.rendezvous("env://", timeout=timedelta(minutes=10)))
        return cls(rank, world, local, store)

    @property
    def first(self) -> bool:
        """Whether this is the rank that prints, and that puts together what all have written."""
        return self.rank == 0

    def share(self, work: Sequence[T]) -> Sequence[T]:
        """Returns this rank's part of what has to be done, in turn; all parts are the whole."""
        return work[self.rank :: self.world]

    def device(self, name: str) -> str:
        """Returns the device of this rank: of several, ``cuda`` means to each its own GPU."""
        if self.world == 1 or name != "cuda" or not torch.cuda.is_available():
            return name
        if self.local >= torch.cuda.device_count():
            raise ConfigError(
                f"Rank {self.rank} has no GPU: here are {torch.cuda.device_count()}, and it is "
                f"process {self.local} on this machine, from 0. Start one process per GPU."
            )
        torch.cuda.set_device(self.local)  # kernels run on the current device
        return f"cuda:{self.local}"

    def meet(self, where: str, waiting: Callable[[], None] = lambda: None) -> None:
        """Returns when all ranks have come to ``where``; doing so twice changes nothing.

        Args:
            waiting: called again and again while it waits.
        """
        try:
            self._store.set(f"{where}/{self.rank}", "")
            while not self._store.check([f"{where}/{rank}" for rank in range(self.world)]):
                waiting()
                time.sleep(PAUSE)
        except distributed.DistError as error:
            raise self._left(error) from error

    def count(self, n: int) -> int:
        """Adds ``n`` to a number that all ranks share, and returns it."""
        try:
            return self._store.add("count", n)
        except distributed.DistError as error:
            raise self._left(error) from error

    def once(self, tell: Callable[[], None]) -> None:
        """Calls ``tell`` in the rank that comes first, so that an error of all is told once."""
        try:
            mine = self._store.add("told", 1) == 1
            if not mine:  # ending would make the launcher end the one that tells
                self._store.wait(["all was told"], timedelta(seconds=10))
        except distributed.DistError:  # nobody is left to ask
            mine = True
        if mine:
            tell()
            with suppress(distributed.DistError):
                self._store.set("all was told", "")

    def _left(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"Rank {self.rank} has lost the launcher of its run ({str(error).partition('. ')[0]}). "
            "What was done is kept; the same command resumes it."
        )
