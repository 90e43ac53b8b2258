"""`Turns`: one generator at a time, in order of arrival."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from spmoe.decoding.turns import Turns
from spmoe.errors import Error

WAIT_S = 30.0  # of a test that would hang


@pytest.fixture
def turns() -> Turns:
    return Turns()


def numbers(log: list[str], name: str) -> Generator[int]:
    log.append(f"{name} begins")
    try:
        yield from range(3)
    finally:
        log.append(f"{name} ends")


def wait_until_queued(turns: Turns, count: int) -> None:
    """Return once so many threads wait for their turn behind a running one."""
    while len(turns._queue) <= count:
        os.sched_yield()


def test_threads_get_their_turns_in_the_order_in_which_they_asked(turns: Turns) -> None:
    log: list[str] = []
    first = turns.hold(numbers(log, "first"))
    next(first)
    with ThreadPoolExecutor(5) as threads:
        for place in range(5):
            threads.submit(list, turns.hold(numbers(log, str(place))))
            wait_until_queued(turns, place + 1)
        assert log == ["first begins"]
        list(first)
    assert log == [f"{name} {what}" for name in ("first", *"01234") for what in ("begins", "ends")]


def test_a_turn_begins_with_the_first_item(turns: Turns) -> None:
    first, second = (turns.hold(numbers([], name)) for name in "12")
    assert list(second) == [0, 1, 2]
    assert list(first) == [0, 1, 2]


def test_a_generator_inside_another_of_the_same_thread_is_refused(turns: Turns) -> None:
    outer = turns.hold(numbers([], "outer"))
    next(outer)
    with pytest.raises(Error, match=r"stream .* is not finished.*to its end or close\(\) it"):
        next(turns.hold(numbers([], "inner")))
    assert list(outer) == [1, 2]
    assert list(turns.hold(numbers([], "later"))) == [0, 1, 2]


@pytest.mark.parametrize("how", ["closed", "dropped", "in a cycle", "failed"])
def test_a_turn_ends_with_its_generator(turns: Turns, how: str) -> None:
    log: list[str] = []

    def failing() -> Generator[int]:
        yield 0
        raise ValueError(how)

    held = turns.hold(failing() if how == "failed" else numbers(log, "held"))
    next(held)
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(list, turns.hold(numbers(log, "other")))
        wait_until_queued(turns, 1)
        if how == "closed":
            held.close()
        elif how == "failed":
            with pytest.raises(ValueError, match=how):
                next(held)
        elif how == "in a cycle":
            cycle: list[object] = [held]
            cycle.append(cycle)
            del cycle
        if how != "failed":
            del held
        gc.collect()
        assert other.result(WAIT_S) == [0, 1, 2]
    if how != "failed":  # the generator's own end comes before the next turn
        assert log == ["held begins", "held ends", "other begins", "other ends"]


def test_any_thread_may_go_on_with_a_generator(turns: Turns) -> None:
    held = turns.hold(numbers([], "held"))
    next(held)
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(next, held).result(WAIT_S) == 1
        nested: Future[int] = threads.submit(next, turns.hold(numbers([], "nested")))
        with pytest.raises(Error, match="is not finished"):  # of the thread that read it last
            nested.result(WAIT_S)
        assert list(held) == [2]
        assert threads.submit(list, turns.hold(numbers([], "later"))).result(WAIT_S) == [0, 1, 2]


def test_nobody_waits_for_what_is_closed(turns: Turns) -> None:
    held = turns.hold(numbers([], "held"))
    next(held)
    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(list, turns.hold(numbers([], "other")))
        wait_until_queued(turns, 1)
        turns.close()
        assert other.result(WAIT_S) == [0, 1, 2]
    assert list(held) == [1, 2]


def test_a_forked_child_does_not_wait_for_threads_that_it_lacks(turns: Turns) -> None:
    held = turns.hold(numbers([], "held"))
    with ThreadPoolExecutor(1) as threads:
        threads.submit(next, held).result(WAIT_S)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # that there are other threads
            child = os.fork()
        if child == 0:
            os._exit(len(list(turns.hold(numbers([], "child")))))
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 3
