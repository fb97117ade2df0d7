"""Turns: runs in several threads, or one inside another, share Pyro and torch, whose state is global."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pyro

from pyro_vdo._compat import param_store
from pyro_vdo.loop.reproducible import random_state, seeded_state, set_random_state


class Stream:
    """A stream of random numbers: the state of the global generators, held here while another stream is in place."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self.state = state


class Stage:
    """What is global while a run has its turn: its random stream and its entries in Pyro's parameter store.

    :param stream: the stream of its own, or the one of the world.
    :param owned: gives the ``id`` of the parameters that belong to the modules of the run.
    :param before: names in the store that were there before the run, which stay there.
    """

    def __init__(self, stream: Stream, owned: Callable[[], set[int]], before: frozenset[str]) -> None:
        self.stream = stream
        self._owned = owned
        self._before = before
        self._entries: list[param_store.StoreEntry] = []

    def leave(self) -> None:
        """Take the entries of the run out of the store."""
        self._entries = param_store.take_parameters(self._owned(), self._before)

    def enter(self) -> None:
        """Put them back."""
        param_store.put_parameters(self._entries)


class Turns:
    """Lets runs take turns, so that none sees the random numbers or the parameters of another.

    A run that goes on is left in place until another one, or the end, takes its place.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._depth = 0
        self._world = Stage(Stream(), set, frozenset())
        self._stage = self._world

    def open(self, seed: int | None, owned: Callable[[], set[int]]) -> Stage:
        """The stage of a new run; with a seed it has a stream of its own that starts there."""
        with self._turn(self._world):
            stream = self._world.stream if seed is None else Stream(seeded_state(seed))
            return Stage(stream, owned, frozenset(pyro.get_param_store().keys()))

    @contextmanager
    def __call__(self, stage: Stage) -> Iterator[None]:
        with self._turn(stage):
            yield

    def close(self, stage: Stage) -> None:
        """End a run: the global random state and the parameter store are as they were without it."""
        with self._lock:
            if self._stage is stage:
                self._give(self._world)

    @contextmanager
    def _turn(self, stage: Stage) -> Iterator[None]:
        with self._lock:
            outer = self._stage
            self._give(stage)
            self._depth += 1
            try:
                yield
            finally:
                self._depth -= 1
                if self._depth:  # a run inside of another one's turn
                    self._give(outer)

    def _give(self, stage: Stage) -> None:
        if self._stage is stage:
            return
        left, self._stage = self._stage, stage
        try:
            left.leave()
        finally:  # a run that breaks down gives its place away all the same
            if left.stream is not stage.stream:
                left.stream.state = random_state()
                assert stage.stream.state is not None
                set_random_state(stage.stream.state)
            stage.enter()


TURNS = Turns()
