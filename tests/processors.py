"""Processors emulated by environment variables: every bit-equality test on each of them.

python -m tests.processors [--quick] [pytest's arguments]

torch chooses its own kernels by ATEN_CPU_CAPABILITY, MKL its by MKL_CBWR and, on Intel processors,
MKL_ENABLE_INSTRUCTIONS; a kernel may also split its work by the number of threads. Those that this
machine lacks are left out, by name. `--quick` runs two of them, on the optimizer's tests alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

#: What the kernels of each capability need of the processor.
CAPABILITIES = {
    "default": (),
    "avx2": ("avx2", "fma"),
    "avx512": ("avx512f", "avx512bw", "avx512vl"),
}
#: MKL as it comes, with kernels that any processor has, and with those of old ones.
MKL: dict[str, dict[str, str]] = {
    "MKL as it is": {},
    "MKL COMPATIBLE": {"MKL_CBWR": "COMPATIBLE"},
    "MKL SSE4.2": {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
}
THREADS = (1, 2)
#: The two that differ most from the newest processors: sums by place, and no vector registers.
QUICK = (("avx2", "MKL SSE4.2", 1), ("default", "MKL COMPATIBLE", 2))


@dataclass(frozen=True)
class Processor:
    """One emulated processor.

    Attributes:
        name: of its parts.
        environment: the variables that make it.
        needs: flags of the real processor.
    """

    name: str
    environment: Mapping[str, str] = field(default_factory=dict)
    needs: Sequence[str] = ()


def processors(quick: bool) -> list[Processor]:
    """All combinations, or two of them."""
    chosen = [(a, m, t) for a in CAPABILITIES for m in MKL for t in THREADS]
    return [
        Processor(
            f"{capability}, {mkl}, {threads} thread{'s' if threads > 1 else ''}",
            {
                "ATEN_CPU_CAPABILITY": capability,
                "OMP_NUM_THREADS": str(threads),
                "MKL_NUM_THREADS": str(threads),
                **MKL[mkl],
            },
            CAPABILITIES[capability],
        )
        for capability, mkl, threads in (QUICK if quick else chosen)
    ]


def flags() -> set[str]:
    """What this processor says of itself; empty where nobody tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.split(":")[1] for line in lines if line.startswith("flags")), "").split())


def main(arguments: Sequence[str]) -> int:
    """Run the marked tests on each emulated processor; a line each, and whether all passed."""
    quick = "--quick" in arguments
    rest = [argument for argument in arguments if argument != "--quick"]
    rest = rest or (["tests/mlbfgs", "--numprocesses", "2", "--dist", "loadfile"] if quick else [])
    known, failed = flags(), []
    for processor in processors(quick):
        lacking = sorted(set(processor.needs) - known)
        if lacking:
            print(
                f"skipped  {processor.name}: this processor lacks {', '.join(lacking)}", flush=True
            )
            continue
        environment = {k: v for k, v in os.environ.items() if not k.startswith("MKL_")}
        command = [sys.executable, "-m", "pytest", "-q", "-m", "bit_equal", *rest]
        start = time.monotonic()
        code = subprocess.run(command, env={**environment, **processor.environment}).returncode
        verdict = "passed" if code == 0 else "FAILED"
        print(f"{verdict}   {processor.name}: {time.monotonic() - start:.0f} s", flush=True)
        failed += [processor.name] if code else []
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
