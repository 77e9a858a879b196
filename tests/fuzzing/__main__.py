"""`python -m tests.fuzzing`: generated inputs for every subject, counted in one JSON file."""

from __future__ import annotations

import argparse
import json
import resource
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import torch

from experiments.runs.atomic import write_atomically
from experiments.runs.provenance import describe_origin
from tests.fuzzing.campaign import LIMIT_S, run
from tests.fuzzing.subjects import SUBJECTS

#: So that an input which asks for the whole machine gets an error, as on a smaller one.
MEMORY_BYTES = 12 << 30


def main() -> int:
    """Run the campaign; 1 where an input failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzzing", description=__doc__)
    parser.add_argument("--examples", type=int, default=1000, help="inputs of all together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[subject.name for subject in SUBJECTS])
    parser.add_argument("--out", type=Path, help="a JSON file with the counts")
    chosen = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    torch.set_num_threads(1)
    subjects = [s for s in SUBJECTS if chosen.only in (None, s.name)]
    each = -(-chosen.examples // len(subjects))
    tallies = {}
    for subject in subjects:
        with tempfile.TemporaryDirectory(prefix="fuzzing.") as folder:
            (Path(folder) / "scratch").mkdir()
            tally = run(subject, Path(folder) / "scratch", examples=each, number=chosen.seed)
        tallies[subject.name] = tally
        print(f"{subject.name}: {tally.inputs} inputs, {len(tally.failures)} failed", flush=True)
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
