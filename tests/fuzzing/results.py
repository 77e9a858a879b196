"""Run directories and registries of claims, as somebody else may hand them over."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

from experiments import reproduce, train, worker
from experiments.analysis.__main__ import main as analyse
from experiments.analysis.judging.claims import DEFAULT_CLAIMS
from experiments.analysis.judging.registry import judge_registry
from experiments.analysis.showing.registry_page import write_page
from experiments.entry import entry
from experiments.report.__main__ import main as report
from tests.fuzzing.mutations import BYTE_CHANGES, TREE_CHANGES, changed_bytes, changed_tree

FILES = ("config.yaml", "meta.json", "status.json", "metrics.jsonl")
ODD_FILES = ("empty", "folder", "pipe", "loop", "endless", "absent", "zeros")
RUN_DIRECTORIES = st.tuples(
    st.sampled_from(FILES),
    st.one_of(TREE_CHANGES, TREE_CHANGES, BYTE_CHANGES, st.sampled_from(ODD_FILES)),
    st.sampled_from(("all", "all", "experiment", "diff", "status", "resume", "worker")),
)
CLAIMS = st.tuples(
    st.sampled_from(("claims.yaml", "claims.yaml", "paper")),
    st.one_of(TREE_CHANGES, TREE_CHANGES, BYTE_CHANGES, st.sampled_from(ODD_FILES)),
)
#: Enough of the registry for every kind of claim that runs can settle.
CLAIMS_KEPT = 12
_ARGUMENTS = ["scale=smoke", "train.threads=1", "train.timeout_s=60"]


@functools.cache
def template() -> Path:
    """A results directory with a real run of two optimizers each."""
    folder = Path(tempfile.mkdtemp(prefix="fuzzing-runs."))
    with contextlib.redirect_stdout(None):
        for name in ("sgd", "mlbfgs"):
            arguments = [*_ARGUMENTS, f"optimizer={name}", f"results_dir={folder}"]
            assert train.main(arguments) == 0
    return folder


def _fresh(scratch: Path) -> Path:
    results = scratch / "results" / "given"
    shutil.rmtree(results, ignore_errors=True)
    shutil.copytree(template(), results)
    return results


def spoil(path: Path, how: Any) -> None:
    """Change a file: its tree, its bytes, or what it is."""
    if isinstance(how, str):
        path.unlink()
        _replace(path, how)
    elif hasattr(how[0], "new"):
        path.write_bytes(changed_bytes(path.read_bytes(), how))
    elif path.suffix == ".yaml":
        tree = changed_tree(yaml.safe_load(path.read_text()), how)
        path.write_text(yaml.safe_dump(tree), encoding="utf-8", errors="surrogatepass")
    elif path.suffix == ".json":
        path.write_text(json.dumps(changed_tree(json.loads(path.read_text()), how)))
    else:
        records = [json.loads(line) for line in path.read_text().splitlines()]
        records = changed_tree(records, how)
        lines = records if isinstance(records, list) else [records]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _replace(path: Path, kind: str) -> None:
    if kind == "empty":
        path.touch()
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "zeros":
        path.write_bytes(b"\x00" * 5000)


def use_run(scratch: Path, example: Any) -> int:
    """Judge, compare, resume or train what stands in a spoilt run directory."""
    file, how, what = example
    results = _fresh(scratch)
    (run,) = (results / "runs" / "digits_mlp" / "mlbfgs").iterdir()
    spoil(run / file, how)
    if what == "all":
        return analyse([str(results), "--all"])
    if what == "experiment":
        return analyse([str(results), "--experiment", "digits_mlp"])
    if what == "diff":
        return report(["diff", str(template()), str(results)])
    if what == "status":
        common = ["digits_mlp", "--scale", "smoke", "--seeds", "0", "--status"]
        return reproduce.main([*common, "--results-dir", str(results)])
    if what == "worker":
        return worker.main([str(run)])
    return train.main([*_ARGUMENTS, "optimizer=mlbfgs", f"results_dir={results}"])


@functools.cache
def _claims() -> dict[str, Any]:
    content = yaml.safe_load(DEFAULT_CLAIMS.read_text(encoding="utf-8"))
    kept = {k: v for k, v in content.items() if not v.keys() & {"contradicts", "presupposes"}}
    return dict(list(kept.items())[:CLAIMS_KEPT])


def judge_claims(scratch: Path, example: Any) -> int:
    """Judge a spoilt registry, and write its page."""
    file, how = example
    results = _fresh(scratch)
    shutil.copytree(DEFAULT_CLAIMS.parent / "paper", results / "paper")
    registry = results / "claims.yaml"
    registry.write_text(yaml.safe_dump(_claims()), encoding="utf-8")
    spoil(registry if file != "paper" else sorted((results / "paper").glob("*.yaml"))[0], how)

    def judge(_: object) -> int:
        write_page(judge_registry(results, registry))
        return 0

    return entry(judge)()
