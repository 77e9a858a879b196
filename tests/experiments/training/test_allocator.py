"""A process that keeps freed memory is handed no page twice; each claim in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.training.allocator import keep_freed_memory

ROOT = Path(__file__).parents[3]
SET = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or "glibc" not in os.confstr("CS_GNU_LIBC_VERSION"),
    reason="needs glibc",
)

# 64 times a tensor of 48 MiB, above all that glibc keeps by itself: 12,288 pages each.
FAULTS = """
import resource, torch
from experiments.training.allocator import keep_freed_memory
kept = {keep} and keep_freed_memory()
torch.ones(12 * 2**20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(64):
    torch.ones(12 * 2**20)
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

# What is freed below a block in use stays with the process until it is asked to return it.
RESIDENT = """
import torch
from pathlib import Path
from experiments.training.allocator import keep_freed_memory, return_freed_memory
def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20
assert keep_freed_memory()
below, above = torch.ones(64 * 2**20), torch.ones(2**20)
held = resident()
del below
freed = resident()
return_freed_memory()
print(held, freed, resident())
"""


def said_by(code, **variables):
    environment = {k: v for k, v in os.environ.items() if k not in SET} | variables
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_allocator_that_keeps_memory_asks_for_no_page_twice():
    kept, faults = said_by(FAULTS.format(keep=True))
    assert kept == "True"
    assert int(faults) <= 2 * 12_288  # two of the 64 at most


def test_allocator_as_given_asks_for_every_page_again():
    kept, faults = said_by(FAULTS.format(keep=False), THP_MEM_ALLOC_ENABLE="0")
    assert kept == "False"
    assert int(faults) > 32 * 12_288  # what the test above would miss if it could not fail


def test_allocator_returns_what_it_kept_when_asked():
    held, freed, returned = map(float, said_by(RESIDENT))
    assert freed > held - 8  # MiB; kept
    assert returned < held - 200


@pytest.mark.parametrize("name", SET)
def test_allocator_set_by_the_user_stays_as_set(name):
    assert not keep_freed_memory({name: "131072"})
