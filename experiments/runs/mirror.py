"""An optional copy of a run's records at wandb; the files of the run directory stay the truth.

Whatever goes wrong with wandb (it is not installed, there is no network, it raises) is logged once
and ends the mirror, never the run.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from omegaconf import OmegaConf

from experiments.errors import UserError, nearest
from experiments.runs.atomic import refuse_links
from experiments.runs.spec import RunSpec

logger = logging.getLogger(__name__)

MODES = ("offline", "online")
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
        spec: the run; `logger.mode` is offline (default) or online, `logger.project` the project.
        path: its run directory; wandb's own files go to the folder `wandb` in it.
    """

    def __init__(self, spec: RunSpec, path: Path):
        self._run: Any = None
        try:
            self._run = _start(spec, path)
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
        UserError: `logger.mode` is unknown, or the folder of wandb's files is a link.
    """
    settings = spec.config.logger
    if settings.name == "files":
        return NoMirror()
    mode = str(settings.get("mode", "offline"))
    if mode not in MODES:
        raise UserError(f"logger.mode={mode!r} is unknown: {nearest(mode, MODES)}")
    refuse_links(path / "wandb", path)
    return WandbMirror(spec, path)


def _start(spec: RunSpec, path: Path) -> Any:
    import wandb  # optional, and slow to import where it is not wanted

    settings = spec.config.logger
    mode = str(settings.get("mode", "offline"))
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
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,
        ),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run
