"""One check and what became of it; a failure is told, and the checks after it go on."""

from __future__ import annotations

import gc
import logging
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch

from experiments.training.clock import peak_memory_bytes, restart_peak_memory

logger = logging.getLogger(__name__)

Status = Literal["pass", "fail", "refused", "not on this device", "not run"]
Details = dict[str, Any]


class NotOnThisDeviceError(Exception):
    """The check is about another kind of device."""


class RefusedError(Exception):
    """The suite itself refuses the combination in words; that is no failure."""


@dataclass(frozen=True)
class Check:
    """Something to try.

    Attributes:
        name: in the report, with slashes between its parts.
        run: returns what is to stand in the report; raises where something is wrong.
    """

    name: str
    run: Callable[[], Details]


def run_checks(
    checks: Iterator[Check], device: torch.device, *, limit_s: float
) -> list[dict[str, Any]]:
    """Run checks one after the other.

    Args:
        checks: in order.
        device: whose peak of memory is measured, for each check.
        limit_s: seconds after which no further one is begun.

    Returns:
        One record a check: `name`, `status`, `seconds`, `peak_memory_bytes`, `reason` (where it did
        not pass) and its details.
    """
    records: list[dict[str, Any]] = []
    started = time.monotonic()
    for check in checks:
        if time.monotonic() - started > limit_s:
            reason = f"--limit-s {limit_s:g} was over"
            records.append({"name": check.name, "status": "not run", "reason": reason})
            continue
        record = _record(check, device)
        told = f": {record['reason']}" if "reason" in record else ""
        logger.info("%-18s %s%s", record["status"], check.name, told)
        records.append(record)
    return records


def _record(check: Check, device: torch.device) -> dict[str, Any]:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    restart_peak_memory(device)
    start = time.monotonic()
    status: Status = "pass"
    details: Details = {}
    try:
        details = check.run()
    except NotOnThisDeviceError as error:
        status, details = "not on this device", {"reason": str(error)}
    except RefusedError as error:
        status, details = "refused", {"reason": str(error)}
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        trace = traceback.format_exc().splitlines()[-12:]
        status, details = "fail", {"reason": reason[:500], "traceback": trace}
    return {
        "name": check.name,
        "status": status,
        "seconds": round(time.monotonic() - start, 3),
        "peak_memory_bytes": peak_memory_bytes(device),
        **details,
    }
