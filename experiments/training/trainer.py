"""A run from its frozen config to its finished directory: opened, trained, and accounted for.

The loop itself is in `experiments.training.loop`, one step of it in `experiments.training.step`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from experiments.errors import UserError
from experiments.runs.directory import RunDirectory, Status, write_traceback
from experiments.runs.metrics import EpochRecord
from experiments.runs.spec import RunSpec
from experiments.training.interruption import StopRequest
from experiments.training.loop import TrainingLoop
from experiments.training.ranks import ALONE, LostRankError, Ranks
from experiments.training.records import LeaderRecords, Records

logger = logging.getLogger(__name__)


class Trainer:
    """Runs one spec in its run directory.

    Args:
        spec: the run.
        path: the run directory, if it is not `spec.directory`.
        on_epoch: called with each epoch record once it is on file; on the leader alone.
        ranks: who trains together; each of them has a trainer.
    """

    def __init__(
        self,
        spec: RunSpec,
        path: Path | None = None,
        *,
        on_epoch: Callable[[EpochRecord], None] | None = None,
        ranks: Ranks = ALONE,
    ):
        self._spec = spec
        self._path = spec.directory if path is None else path
        self._on_epoch = on_epoch
        self._ranks = ranks

    def run(self) -> Status:
        """Train until the run is finished or its time is up, from the newest checkpoint on.

        Returns:
            `done`, `diverged` or `timeout`. A run that is already finished is not repeated.

        Raises:
            UserError: a mistake that the user can repair; recorded as `refused` where the
                directory is ours.
            KeyboardInterrupt: SIGINT came; the run is left resumable at a checkpoint.
            SystemExit: another signal to stop came, to any rank; the same.
            LostRankError: another rank ended or was silent for too long.
        """
        with ExitStack() as stack:
            opened: list[RunDirectory] = []

            def open_directory() -> Status | None:
                directory = stack.enter_context(RunDirectory.open(self._spec, self._path))
                opened.append(directory)
                if directory.finished and directory.status:
                    return directory.status.status
                if directory.status is not None:  # else how the last attempt ended would be ours
                    directory.write_status(replace(directory.status, status="running", message=""))
                return None

            finished = self._ranks.from_leader(open_directory)
            if finished is not None:
                logger.info("already finished (%s): %s", finished, self._path)
                return finished
            stop = StopRequest()
            if self._ranks.world_size > 1:
                # When one rank fails, torchrun ends the others; they have to give an account first.
                stack.enter_context(stop)
            return self._train(opened[0] if opened else None, stop)

    def _train(self, directory: RunDirectory | None, stop: StopRequest) -> Status:
        records = Records() if directory is None else LeaderRecords(self._spec, directory)
        try:
            loop = TrainingLoop(self._spec, self._path, records, stop, self._ranks, self._on_epoch)
            ending = loop.run()
        except UserError as error:
            self._ranks.account(error)
            if directory is not None:
                directory.record_refusal(error)
            raise
        except Exception as error:
            account = self._ranks.account(error)
            if directory is not None:
                directory.record_crash(error, account)
            elif account is None:
                write_traceback(self._path, error, rank=self._ranks.rank)
            if account is not None:
                raise LostRankError(account) from error
            raise
        self._ranks.barrier()  # nobody says that the run is over before the leader has written it
        return ending
