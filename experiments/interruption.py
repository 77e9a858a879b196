"""Ending between two steps: a signal to stop is noted when it comes and obeyed later."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

logger = logging.getLogger(__name__)


class StopRequest:
    """Notes the signals to stop, so that the loop can end at a step; a second one ends at once.

    They are SIGINT, SIGTERM and SIGUSR1, which schedulers send before they take a machine away.
    Signals can be caught in the main thread only; elsewhere they are left as they are.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
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
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self._signal is not None:
            self.obey()
        self._signal = number
