"""An optional copy of a run's records at wandb; the files of the run directory stay the truth.

Whatever goes wrong with wandb (it is not installed, nobody is logged in, there is no network, it
raises) is logged once and ends the mirror, never the run. It never asks: a run must not wait for an
answer. wandb's own variables come before the config: WANDB_MODE, WANDB_DISABLED,
WANDB_INIT_TIMEOUT, WANDB_FINISH_TIMEOUT.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from omegaconf import OmegaConf

from experiments.errors import UserError, nearest
from experiments.runs.atomic import refuse_links
from experiments.runs.spec import RunSpec

logger = logging.getLogger(__name__)

MODES = ("offline", "online")
# What else WANDB_MODE may say.
_ENVIRONMENT_MODES = {"dryrun": "offline", "run": "online", "disabled": "disabled"}
INIT_TIMEOUT_S = 30.0
FINISH_TIMEOUT_S = 60.0


class Mirror(Protocol):
    """Gets every record that `metrics.jsonl` gets."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Take one record."""

    def finish(self, status: str) -> None:
        """Take the status that the run ended with; no record follows."""


class NoMirror:
    """Files alone."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Do nothing."""

    def finish(self, status: str) -> None:
        """Do nothing."""


class WandbMirror:
    """Copies the records to a wandb run whose id is the run key, so that a resume continues it.

    Args:
        spec: the run; `logger.project` is the project.
        path: its run directory; wandb's own files go to the folder `wandb` in it.
        mode: offline or online.
    """

    def __init__(self, spec: RunSpec, path: Path, mode: str = "offline"):
        self._run: Any = None
        try:
            with _nobody_to_ask():
                self._run = _start(spec, path, mode)
        except Exception as error:
            self._give_up(error)

    def log(self, record: Mapping[str, Any]) -> None:
        """Send one record; its values are named `<kind>/<name>`, per block for curvature."""
        if self._run is None:
            return
        prefix = str(record["kind"])
        if "block" in record:
            prefix = f"{prefix}/block{record['block']}"
        values = {
            f"{prefix}/{name}": value
            for name, value in record.items()
            if name not in ("kind", "block", "step")
        }
        try:
            self._run.log({"step": record["step"], **values})
        except Exception as error:
            self._give_up(error)

    def finish(self, status: str) -> None:
        """Close the wandb run with the status in its summary."""
        if self._run is None:
            return
        try:
            self._run.summary["status"] = status
            self._run.finish(exit_code=0)
        except Exception as error:
            self._give_up(error)
        self._run = None

    def _give_up(self, error: Exception) -> None:
        self._run = None
        summary = " ".join(f"{type(error).__name__}: {error}".split())
        logger.warning("wandb mirror is off, the run goes on without it: %s", summary)


def build_mirror(spec: RunSpec, path: Path) -> Mirror:
    """Build the mirror that `logger` asks for.

    Args:
        spec: the run.
        path: its run directory.

    Raises:
        UserError: `logger.mode` or WANDB_MODE is unknown, or the folder of wandb's files is a link.
    """
    if spec.config.logger.name == "files":
        return NoMirror()
    mode = _mode(spec)
    if mode == "disabled":
        logger.info("wandb mirror is off: the environment says so")
        return NoMirror()
    refuse_links(path / "wandb", path)
    return WandbMirror(spec, path, mode)


def _mode(spec: RunSpec) -> str:
    """`logger.mode` (offline by default), or what the environment says instead."""
    configured = str(spec.config.logger.get("mode", "offline"))
    if configured not in MODES:
        raise UserError(f"logger.mode={configured!r} is unknown: {nearest(configured, MODES)}")
    if os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "t", "y"):
        return "disabled"
    named = os.environ.get("WANDB_MODE", "").strip().lower() or configured
    mode = _ENVIRONMENT_MODES.get(named, named)
    if mode not in (*MODES, "disabled"):
        valid = (*MODES, *_ENVIRONMENT_MODES)
        raise UserError(f"WANDB_MODE={named!r} is unknown: {nearest(named, valid)}")
    return mode


@contextmanager
def _nobody_to_ask() -> Iterator[None]:
    """Take the terminal away, from which wandb would read a key and wait for it."""
    before = sys.stdin
    with open(os.devnull, encoding="utf-8") as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = before


def _limit_s(variable: str, otherwise: float) -> float:
    """Seconds that a variable of the environment allows."""
    text = os.environ.get(variable, "").strip()
    return float(text) if text else otherwise


def _start(spec: RunSpec, path: Path, mode: str) -> Any:
    import wandb  # optional, and slow to import where it is not wanted

    settings = spec.config.logger
    init_limit_s = _limit_s("WANDB_INIT_TIMEOUT", INIT_TIMEOUT_S)
    if mode == "online":
        logger.info("wandb: waiting for its server, WANDB_INIT_TIMEOUT = %g s", init_limit_s)
    run = wandb.init(
        project=str(settings.get("project", "mlbfgs")),
        dir=str(path),
        mode="online" if mode == "online" else "offline",
        id=f"{spec.experiment}-{spec.contestant}-{spec.seed}-{spec.key}",
        name=f"{spec.contestant} {spec.scale} seed {spec.seed}",
        group=spec.experiment,
        config=OmegaConf.to_container(spec.config),  # type: ignore[arg-type]
        resume="allow" if mode == "online" else None,
        settings=wandb.Settings(
            console="off",
            silent=True,
            init_timeout=init_limit_s,
            finish_timeout=_limit_s("WANDB_FINISH_TIMEOUT", FINISH_TIMEOUT_S),
        ),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run
