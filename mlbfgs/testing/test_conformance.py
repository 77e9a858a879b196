"""The test that the plugin runs once for each check and optimizer."""

from __future__ import annotations

from typing import Any

import pytest

from mlbfgs.testing.plugin import run_and_record
from mlbfgs.testing.registry import BoundCheck


def test_conformance(conformance_check: BoundCheck, record_property: Any) -> None:
    """Pass, or fail with the check's reason; `unsupported` and `not run` are told apart."""
    outcome = run_and_record(conformance_check, record_property)
    if outcome.status == "not run":
        pytest.skip(f"not run: {outcome.reason}")
    if outcome.status == "fail":
        pytest.fail(f"{outcome.reason}\n\n{outcome.details}", pytrace=False)
