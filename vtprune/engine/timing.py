"""Times of the phases of a call, and of what is ours in them; nothing is timed without a clock."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

import torch

from vtprune.engine.instance import now

P = ParamSpec("P")
R = TypeVar("R")


class Clock:
    """Milliseconds per phase of one call; ``device`` is waited for when one begins and ends.

    A phase within another has both names, such as ``encode.score``.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.ms = device, dict[str, float]()
        self._open: list[str] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Adds the time inside to the phase; inside of itself a phase is not counted twice."""
        if name in self._open:
            yield
            return
        self._open.append(name)
        path = ".".join(self._open)
        began = now(self.device)
        try:
            yield
        finally:
            self._open.pop()
            self.ms[path] = self.ms.get(path, 0.0) + 1000 * (now(self.device) - began)


_clock: ContextVar[Clock | None] = ContextVar("vtprune_clock", default=None)


@contextmanager
def timing(clock: Clock | None, phase: str) -> Iterator[None]:
    """Times what is inside as ``phase``, and what is ``timed`` there; nothing without a clock."""
    token = _clock.set(clock)
    try:
        with part(phase):
            yield
    finally:
        _clock.reset(token)


@contextmanager
def part(phase: str) -> Iterator[None]:
    """Times what is inside while a clock runs."""
    clock = _clock.get()
    if clock is None:
        yield
        return
    with clock.phase(phase):
        yield


def timed(phase: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Times every call of a function while a clock runs."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            with part(phase):
                return function(*args, **kwargs)

        return call

    return decorate
