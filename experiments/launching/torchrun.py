"""A run on several ranks, started by torchrun: on this machine, or on several of them.

Every machine runs the same command; the first one (`launch.node_rank=0`) freezes the config, the
others wait for it, and torchrun's rendezvous brings the ranks together. The results folder is
shared by all machines.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from experiments.errors import UserError
from experiments.launching.processes import run_to_end, shell_line, thread_environment
from experiments.launching.rendezvous import can_open, wait_for_first_machine
from experiments.runs.directory import CONFIG_FILE
from experiments.runs.outcome import Outcome, freeze, recorded_outcome
from experiments.runs.spec import RunSpec

# Workers end at a checkpoint on each of them; torchrun's own four, and the schedulers' SIGUSR1.
SIGNALS = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"


@dataclass(frozen=True, kw_only=True)
class RankSettings:
    """Keys of `launch` that all launchers of several ranks have.

    Attributes:
        name: of the launcher.
        nproc: ranks on each machine; one GPU each, where there are GPUs.
        nnodes: machines.
        max_restarts: how often torchrun starts all ranks anew after one has died.
        timeout_s: how long a rank waits for the others before it gives up, seconds.
        dry_run: freeze the config and say the command instead of running it.
    """

    name: str
    nproc: int
    nnodes: int = 1
    max_restarts: int = 3
    timeout_s: float = 600.0
    dry_run: bool = False

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.nproc * self.nnodes


@dataclass(frozen=True, kw_only=True)
class TorchrunSettings(RankSettings):
    """Keys of `launch` for torchrun.

    Attributes:
        node_rank: 0 on the first machine, then 1, 2, ...
        rdzv_endpoint: host:port of the first machine; needed where there are several.
    """

    node_rank: int = 0
    rdzv_endpoint: str | None = None


def check(spec: RunSpec, settings: TorchrunSettings) -> None:
    """Check what can be known before a process is started.

    Raises:
        UserError: a setting makes no sense, or does not fit the machine or the batch.
    """
    check_ranks(spec, settings)
    if not 0 <= settings.node_rank < settings.nnodes:
        raise UserError(
            f"launch.node_rank={settings.node_rank} must be 0 to {settings.nnodes - 1}: "
            f"launch.nnodes={settings.nnodes}"
        )
    if settings.nnodes > 1 and settings.rdzv_endpoint is None:
        raise UserError(
            f"launch.nnodes={settings.nnodes} needs launch.rdzv_endpoint=HOST:PORT, an address of "
            "the first machine that all of them can reach"
        )
    host, _, port = (settings.rdzv_endpoint or "localhost:0").rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"launch.rdzv_endpoint={settings.rdzv_endpoint} must be HOST:PORT")
    check_devices(str(spec.config.train.device), settings.nproc)


def check_ranks(spec: RunSpec, settings: RankSettings) -> None:
    """Check the numbers of ranks and machines against each other and the batch.

    Raises:
        UserError: a number is out of its range, or a rank would have no image of a batch.
    """
    for key, value in (("nproc", settings.nproc), ("nnodes", settings.nnodes)):
        if value < 1:
            raise UserError(f"launch.{key}={value} must be at least 1")
    if settings.max_restarts < 0:
        raise UserError(f"launch.max_restarts={settings.max_restarts} must be at least 0")
    if settings.timeout_s <= 0:
        raise UserError(f"launch.timeout_s={settings.timeout_s} must be above 0 seconds")
    batch_size = int(spec.config.train.batch_size)
    if settings.world_size > batch_size:
        raise UserError(
            f"launch.nproc={settings.nproc} x launch.nnodes={settings.nnodes} are "
            f"{settings.world_size} ranks for train.batch_size={batch_size} images: a rank needs "
            f"at least one image, so at most {batch_size} ranks will do"
        )


def check_devices(device: str, nproc: int) -> None:
    """Check that there is a GPU for each rank of this machine, if GPUs are to be used.

    Args:
        device: `train.device`.
        nproc: ranks on this machine.

    Raises:
        UserError: there are fewer GPUs than ranks.
    """
    if device == "cpu":
        return
    import torch  # slow to load; the check above does without

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count < nproc and (count > 0 or device == "cuda"):
        raise UserError(
            f"launch.nproc={nproc} ranks, but torch sees {count} GPUs: use launch.nproc={count} "
            "or train.device=cpu"
            if count
            else f"train.device=cuda, but torch sees no GPU for launch.nproc={nproc} ranks: use "
            "train.device=cpu or auto"
        )


def command(directory: Path, settings: RankSettings, *, endpoint: str, run_id: str) -> list[str]:
    """The command that starts this machine's ranks of a run.

    Args:
        directory: the run directory, with its frozen config.
        settings: how many ranks, machines and restarts.
        endpoint: host:port where the machines meet; port 0 is any free one.
        run_id: the same on all machines, and of no other run at the same address.
    """
    limit_s = max(1, int(settings.timeout_s))
    several = [f"--rdzv-conf=join_timeout={limit_s},read_timeout={min(60, limit_s)}"]
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        f"--nnodes={settings.nnodes}",
        f"--nproc-per-node={settings.nproc}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint={endpoint}",
        f"--rdzv-id={run_id}",
        *(several if settings.nnodes > 1 else []),
        f"--max-restarts={settings.max_restarts}",
        f"--signals-to-handle={SIGNALS}",
        *("-m", "experiments.worker", str(directory)),
    ]


def environment(spec: RunSpec) -> dict[str, str]:
    """What the command needs besides this process's environment.

    torchrun gives every rank one thread where nobody says otherwise; so does this, aloud.
    """
    threads: int | None = spec.config.train.threads
    return thread_environment(1 if threads is None else threads)


def planned(spec: RunSpec, settings: TorchrunSettings) -> str:
    """The command as a line for a shell."""
    return shell_line(_command(spec, settings), environment(spec))


def run(spec: RunSpec, settings: TorchrunSettings) -> Outcome:
    """Train on the ranks of this machine, and of the others that run the same command.

    Raises:
        UserError: the directory cannot be used, or the first machine does not begin.
    """
    if settings.node_rank == 0:
        if not can_open(_endpoint(settings)):
            raise UserError(
                f"launch.rdzv_endpoint={settings.rdzv_endpoint}: that port of this machine is "
                "taken by another program; name another one"
            )
        freeze(spec)
    else:
        _wait_for_config(spec.directory / CONFIG_FILE, settings.timeout_s)
        wait_for_first_machine(_endpoint(settings), settings.timeout_s)
    if settings.nnodes > 1:
        print(
            f"waiting until {settings.nnodes} machines are at {_endpoint(settings)}, "
            f"launch.timeout_s={settings.timeout_s:g} s at most",
            flush=True,
        )
    code = run_to_end(_command(spec, settings), {**os.environ, **environment(spec)})
    return recorded_outcome(spec.directory, exit_code=code)


def _command(spec: RunSpec, settings: TorchrunSettings) -> list[str]:
    return command(spec.directory, settings, endpoint=_endpoint(settings), run_id=spec.key)


def _endpoint(settings: TorchrunSettings) -> str:
    return settings.rdzv_endpoint or "localhost:0"


def _wait_for_config(path: Path, limit_s: float) -> None:
    deadline = time.monotonic() + limit_s
    if not path.exists():
        print(f"waiting for {path} of the first machine, {limit_s:g} s at most", flush=True)
    while not path.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"no {path} after launch.timeout_s={limit_s:g} s: start launch.node_rank=0 too, "
                "with results_dir on a file system that all machines share"
            )
        time.sleep(0.2)
