"""A run under SLURM, submitted through submitit: one task a machine, each of which is a torchrun.

Before the time limit and on preemption SLURM sends a signal. The job then has torchrun end the
ranks at a checkpoint, and puts itself back into the queue; the next start goes on from there.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments.errors import UserError
from experiments.launching import torchrun
from experiments.launching.processes import shell_line
from experiments.launching.rendezvous import can_open
from experiments.runs.atomic import make_folder
from experiments.runs.outcome import Outcome, freeze, recorded_outcome
from experiments.runs.spec import RunSpec
from experiments.supervision import signalled_at_parents_death

if TYPE_CHECKING:
    import submitit

logger = logging.getLogger(__name__)

LOG_FOLDER = "slurm"
SLURM_ONLY = ("setup", "partition", "account", "signal_delay_s")


@dataclass(frozen=True, kw_only=True)
class SlurmSettings(torchrun.RankSettings):
    """Keys of `launch` for SLURM.

    Attributes:
        cluster: `slurm`, or submitit's `local`: the same job on this machine without a scheduler.
        time_min: time limit of the job, minutes; a run that needs more is put back into the queue.
        signal_delay_s: how long before the limit SLURM sends the signal, seconds.
        max_timeouts: how often the job goes back into the queue after its time limit.
        partition: where to submit; null: SLURM's default.
        account: who pays; null: SLURM's default.
        gpus_per_node: GPUs asked for on each machine; 0 for none.
        cpus_per_task: processors asked for on each machine, for all its ranks.
        mem_gb: memory asked for on each machine; null: SLURM's default.
        setup: shell commands that each job starts with (`module load ...`).
    """

    cluster: Literal["slurm", "local"] = "slurm"
    time_min: int = 240
    signal_delay_s: int = 120
    max_timeouts: int = 100
    partition: str | None = None
    account: str | None = None
    gpus_per_node: int = 0
    cpus_per_task: int = 1
    mem_gb: float | None = None
    setup: tuple[str, ...] = ()


class Task:
    """What one machine of a job does; submitit pickles it.

    Args:
        directory: the run directory.
        settings: of the launcher.
        run_id: the run's key.
        environment: for the ranks, besides what the job has.
    """

    def __init__(
        self, directory: Path, settings: SlurmSettings, *, run_id: str, environment: dict[str, str]
    ):
        self._directory = directory
        self._settings = settings
        self._run_id = run_id
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> str:
        """Run this machine's ranks to their end.

        Returns:
            The status of the run.

        Raises:
            RuntimeError: the ranks ended without a result.
        """
        import submitit

        host = submitit.JobEnvironment().hostnames[0]
        if submitit.JobEnvironment().node == 0 and not can_open(f"{host}:{self.port}"):
            raise RuntimeError(
                f"port {self.port} of {host}, which follows from the run's key, is taken by "
                "another program: end that, or submit to other machines"
            )
        command = self.command(f"{host}:{self.port}")
        # SLURM signals all processes of a job; submitit's signal would end torchrun and ranks.
        ignored = submitit.JobEnvironment().USR_SIG
        self._process = subprocess.Popen(
            ["env", f"--ignore-signal={ignored}", *command],
            env={**os.environ, **self._environment},
            preexec_fn=signalled_at_parents_death(),
        )
        while (code := self._process.poll()) is None:  # not wait(): a signal handler waits too
            time.sleep(0.2)
        self._process = None
        outcome = recorded_outcome(self._directory, exit_code=code)
        if code != 0:
            raise RuntimeError(f"{outcome.status}: {outcome.message}")
        return outcome.status

    def command(self, endpoint: str) -> list[str]:
        """The torchrun of one machine."""
        return torchrun.command(
            self._directory, self._settings, endpoint=endpoint, run_id=self._run_id
        )

    @property
    def port(self) -> int:
        """Where the machines meet: between 20000 and 39999, by the run's key."""
        return 20000 + int(self._run_id, 16) % 20000

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """End the ranks at a checkpoint and say what to put back into the queue.

        submitit calls this in the handler of SLURM's signal, on the first machine; the ranks of
        the others end at the same step because all ranks agree on it.
        """
        import submitit

        if self._process is not None:
            os.kill(self._process.pid, signal.SIGTERM)
            # not Popen.wait: the interrupted frame may hold its lock
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
            self._process = None
        again = Task(
            self._directory, self._settings, run_id=self._run_id, environment=self._environment
        )
        return submitit.helpers.DelayedSubmission(again)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the process."""
        return {**self.__dict__, "_process": None}


def check(spec: RunSpec, settings: SlurmSettings) -> None:
    """Check what can be known before a job is submitted.

    Raises:
        UserError: submitit or SLURM is absent, or a setting makes no sense.
    """
    torchrun.check_ranks(spec, settings)
    try:
        import submitit  # noqa: F401
    except ImportError as error:
        raise UserError(
            "launch=slurm needs the package submitit: pip install 'mlbfgs[slurm]'"
        ) from error
    for key in ("time_min", "signal_delay_s", "cpus_per_task"):
        if getattr(settings, key) < 1:
            raise UserError(f"launch.{key}={getattr(settings, key)} must be at least 1")
    if settings.signal_delay_s >= 60 * settings.time_min:
        raise UserError(
            f"launch.signal_delay_s={settings.signal_delay_s} is not before the end of "
            f"launch.time_min={settings.time_min} minutes"
        )
    if settings.gpus_per_node and settings.nproc > settings.gpus_per_node:
        raise UserError(
            f"launch.nproc={settings.nproc} ranks for launch.gpus_per_node="
            f"{settings.gpus_per_node}: a rank needs a GPU of its own"
        )
    if settings.cluster == "local":
        if settings.nnodes > 1:
            raise UserError(
                f"launch.cluster=local is one machine, not launch.nnodes={settings.nnodes}"
            )
        torchrun.check_devices(str(spec.config.train.device), settings.nproc)
    elif not settings.dry_run and shutil.which("sbatch") is None:
        raise UserError(
            "launch=slurm, but there is no sbatch on this machine: submit from a login node, or "
            "see the job with launch.dry_run=true"
        )


def planned(spec: RunSpec, settings: SlurmSettings) -> str:
    """The batch file that would be submitted, and the command of its first machine."""
    from submitit.slurm.slurm import _make_sbatch_string

    folder = spec.directory / LOG_FOLDER
    parameters = _parameters(spec, settings)
    # submitit's names for all schedulers, and what it makes of them for SLURM
    named = {"timeout_min": "time", "tasks_per_node": "ntasks_per_node", "name": "job_name"}
    if "mem_gb" in parameters:
        parameters["mem"] = f"{parameters.pop('mem_gb'):g}GB"
    batch = _make_sbatch_string(
        command=shlex.join([sys.executable, "-u", "-m", "submitit.core._submit", str(folder)]),
        folder=folder,
        **{named.get(key, key): value for key, value in parameters.items()},
    )
    task = _task(spec, settings)
    endpoint = f"<first machine>:{task.port}"
    line = shell_line(task.command(endpoint), torchrun.environment(spec))
    return f"{batch}\n# on each machine this runs\n# {line}"


def submit(spec: RunSpec, settings: SlurmSettings) -> Outcome:
    """Put the run into the queue.

    Raises:
        UserError: the directory cannot be used, or SLURM refuses the job.
    """
    import submitit

    freeze(spec)
    folder = make_folder(spec.directory / LOG_FOLDER, below=spec.directory)
    executor = submitit.AutoExecutor(
        folder=folder,
        cluster=settings.cluster,
        **{f"{settings.cluster}_max_num_timeout": settings.max_timeouts},
    )
    # what is no parameter of all schedulers wants the scheduler's name before its own
    own = ("setup",) if settings.cluster == "local" else SLURM_ONLY
    executor.update_parameters(
        **{
            f"{settings.cluster}_{key}" if key in own else key: value
            for key, value in _parameters(spec, settings).items()
            if key in own or key not in SLURM_ONLY
        }
    )
    try:
        job = executor.submit(_task(spec, settings))
    except (RuntimeError, OSError, submitit.core.utils.FailedJobError) as error:
        raise UserError(f"SLURM refuses the job: {' '.join(str(error).split())}") from error
    return Outcome(spec.directory, "submitted", f"job {job.job_id}, output in {folder}")


def is_queued(directory: Path) -> bool:
    """Whether a run was submitted by a job that has neither ended nor failed, as far as is known.

    Args:
        directory: of the run.
    """
    folder = directory / LOG_FOLDER
    names = (path.name for path in folder.glob("*_submitted.pkl"))
    results = (folder / name.replace("_submitted.pkl", "_0_result.pkl") for name in names)
    return not all(result.exists() for result in results)


def _task(spec: RunSpec, settings: SlurmSettings) -> Task:
    directory = spec.directory.resolve()  # a job starts in a folder of its own choice
    return Task(directory, settings, run_id=spec.key, environment=torchrun.environment(spec))


def _parameters(spec: RunSpec, settings: SlurmSettings) -> dict[str, Any]:
    values = asdict(settings)
    optional = {key: values[key] for key in ("partition", "account", "mem_gb")}
    optional["setup"] = list(settings.setup)
    return {
        "name": f"{spec.experiment}-{spec.optimizer}-seed{spec.seed}",
        "nodes": settings.nnodes,
        "tasks_per_node": 1,
        "cpus_per_task": settings.cpus_per_task,
        "gpus_per_node": settings.gpus_per_node,
        "timeout_min": settings.time_min,
        "signal_delay_s": settings.signal_delay_s,
        **{key: value for key, value in optional.items() if value},
    }
