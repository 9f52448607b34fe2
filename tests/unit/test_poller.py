"""Waiting at descriptors: what happens there, and being woken."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterator

import pytest

from cloud.engine.executor.poller import Poller


@pytest.fixture
def poller() -> Iterator[Poller]:
    made = Poller(2)
    yield made
    made.close()
    made.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_it_tells_what_happens_at_the_descriptors_it_watches(poller: Poller, pipe: tuple[int, int]) -> None:
    theirs, ours = pipe
    assert poller.look() == poller.spin() == poller.sleep(0.001) == []
    poller.watch(theirs)
    os.write(ours, b"x")
    assert poller.look() == poller.spin() == poller.sleep(None) == [(theirs, select.POLLIN)]
    poller.forget(theirs)
    assert poller.look() == []


def test_it_waits_for_room_only_while_that_is_asked_for(poller: Poller, pipe: tuple[int, int]) -> None:
    _, ours = pipe
    poller.watch(ours, writes=True)
    assert poller.look() == [(ours, select.POLLOUT)]
    poller.watch(ours)
    assert poller.look() == []


def test_a_sleeper_is_woken(poller: Poller) -> None:
    found: list[object] = []
    sleeper = threading.Thread(target=lambda: found.append(poller.sleep(None)))
    sleeper.start()
    while not poller.asleep:
        pass
    poller.interrupt()
    sleeper.join(10)
    assert found == [[(poller.woken, select.POLLIN)]]
    poller.heed()
    assert poller.look() == []
    assert not poller.asleep


def test_who_goes_to_sleep_after_the_interrupt_does_not_sleep(poller: Poller) -> None:
    for _ in range(100_000):
        poller.interrupt()  # more than the pipe holds
    assert poller.sleep(None) == [(poller.woken, select.POLLIN)]
    while poller.look():
        poller.heed()
    assert poller.sleep(0.001) == []


def test_closed_it_takes_interrupts_without_harm() -> None:
    poller = Poller(2)
    poller.close()
    poller.interrupt()
