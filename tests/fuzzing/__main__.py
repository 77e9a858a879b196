"""`python -m tests.fuzzing`: generated inputs for every subject, counted in one JSON file."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib import metadata
from pathlib import Path

import torch

from experiments.runs.atomic import write_atomically
from experiments.runs.provenance import describe_origin
from tests.fuzzing.campaign import LIMIT_S, Tally, run
from tests.fuzzing.subjects import SUBJECTS

#: So that an input which asks for the whole machine gets an error, as on a smaller one.
MEMORY_BYTES = 12 << 30


#: Inputs that one process makes in a row.
CHUNK = 25


def _chunk(name: str, examples: int, number: int) -> Tally:
    (subject,) = [subject for subject in SUBJECTS if subject.name == name]
    with tempfile.TemporaryDirectory(prefix="fuzzing.") as folder:
        (Path(folder) / "scratch").mkdir()
        return run(subject, Path(folder) / "scratch", examples=examples, number=number)


def main() -> int:
    """Run the campaign; 1 where an input failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__)
    parser.add_argument("--examples", type=int, default=1000, help="inputs of all together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes side by side; default: 2")
    parser.add_argument("--only", choices=[subject.name for subject in SUBJECTS])
    parser.add_argument("--out", type=Path, help="a JSON file with the counts")
    chosen = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    torch.set_num_threads(1)
    subjects = [s for s in SUBJECTS if chosen.only in (None, s.name)]
    each = -(-chosen.examples // len(subjects))
    for subject in subjects:
        subject.prepare()
    tallies = {subject.name: Tally() for subject in subjects}
    # Forked, so that torch is loaded once; a chunk has a seed of its own.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(chosen.jobs, mp_context=context) as pool:
        chunks = {
            pool.submit(
                _chunk, subject.name, min(CHUNK, each - first), chosen.seed + first
            ): subject
            for subject in subjects
            for first in range(0, each, CHUNK)
        }
        for done in as_completed(chunks):
            name, tally = chunks[done].name, done.result()
            tallies[name].add(tally)
            print(f"{name}: {tally.inputs} inputs, {len(tally.failures)} failed", flush=True)
            for failure in tally.failures:
                print(failure, end="\n\n", flush=True)
    failed = sum(len(tally.failures) for tally in tallies.values())
    result = {
        "command": f"python -m tests.fuzzing --examples {chosen.examples} --seed {chosen.seed}",
        "origin": describe_origin(torch.device("cpu")),
        "hypothesis": metadata.version("hypothesis"),
        "seed": chosen.seed,
        "limit_s": LIMIT_S,
        "inputs": sum(tally.inputs for tally in tallies.values()),
        "failures": failed,
        "subjects": {
            name: {
                "inputs": tally.inputs,
                "failures": len(tally.failures),
                "answers": dict(sorted(tally.answers.items())),
                "slowest_s": round(tally.slowest_s, 2),
            }
            for name, tally in tallies.items()
        },
    }
    if chosen.out is not None:
        write_atomically(chosen.out.resolve(), json.dumps(result, indent=2) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
