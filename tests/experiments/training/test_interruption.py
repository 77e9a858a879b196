"""A signal to stop, obeyed between two steps."""

from __future__ import annotations

import os
import signal

import pytest

from experiments.training import interruption
from experiments.training.interruption import StopRequest


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("number", "ending", "code"),
    [
        (signal.SIGINT, KeyboardInterrupt, None),
        (signal.SIGTERM, SystemExit, 143),
        (signal.SIGUSR1, SystemExit, 138),
    ],
)
def test_signal_is_noted_and_obeyed_later(number, ending, code):
    with StopRequest() as stop:
        stop.obey()  # nothing came
        assert not stop.requested
        send(number)
        assert stop.requested
        with pytest.raises(ending) as raised:
            stop.obey()
    assert getattr(raised.value, "code", None) == code


def test_the_same_request_on_several_ways_is_one():
    """A scheduler signals the ranks, and torchrun, which signals the ranks again."""
    with StopRequest() as stop:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            send(number)
        with pytest.raises(SystemExit) as raised:
            stop.obey()
    assert raised.value.code == 143  # as the first one says


def test_second_request_ends_at_once(monkeypatch):
    monkeypatch.setattr(interruption, "SAME_REQUEST_S", 0.0)
    with StopRequest():
        send(signal.SIGTERM)
        with pytest.raises(SystemExit):
            send(signal.SIGTERM)


def test_signals_are_given_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest():
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
