"""Ending between two steps: a signal to stop is noted when it comes and obeyed later."""

from __future__ import annotations

import logging
import signal
import threading
import time
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)

# One request to stop comes on several ways: a scheduler signals all processes of a job, torchrun
# passes on what it got, a terminal signals every process in the foreground.
SAME_REQUEST_S = 5.0
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class StopRequest:
    """Notes the signals to stop, so that the loop can end at a step; a second request ends at once.

    They are SIGINT, SIGTERM, SIGHUP (the terminal is gone) and SIGUSR1, which schedulers send
    before they take a machine away. What the process was started to ignore, as `nohup` does, it
    goes on to ignore.
    What comes within `SAME_REQUEST_S` of the first is the same request.
    Signals can be caught in the main thread only; elsewhere they are left as they are.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._noted_s = 0.0
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal came."""
        return self._signal is not None

    def obey(self) -> None:
        """End as the signal would have, if one came.

        Raises:
            KeyboardInterrupt: for SIGINT.
            SystemExit: for the others, with the shell's exit status for them.
        """
        if self._signal is None:
            return
        logger.warning("%s: stopped at a checkpoint", signal.Signals(self._signal).name)
        if self._signal == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self._signal)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                # Ctrl-C is ignored in a pool until a run begins.
                if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT:
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self._signal is None:
            self._signal, self._noted_s = number, time.monotonic()
        elif time.monotonic() - self._noted_s > SAME_REQUEST_S:
            self.obey()
