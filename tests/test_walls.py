"""The walls between the rooms (docs/architecture.md), kept over the imports of every file."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STANDARD = set(sys.stdlib_module_names)


def imports_of(path: Path) -> set[str]:
    """Every imported module, dotted, wherever in the file the import stands."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def violations(files: list[Path], forbidden) -> list[str]:
    assert files
    return [f"{p.relative_to(ROOT)}: {m}" for p in files for m in imports_of(p) if forbidden(m)]


def sources(*folders: str) -> list[Path]:
    return sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))


def within(module: str, *packages: str) -> bool:
    return any(module == p or module.startswith(f"{p}.") for p in packages)


def test_the_optimizer_needs_torch_and_the_standard_library_alone():
    def forbidden(module):
        return module.split(".")[0] not in STANDARD | {"torch", "mlbfgs"}

    files = [p for p in sources("mlbfgs") if "testing" not in p.parts]
    assert violations(files, forbidden) == []


def test_the_conformance_plugin_needs_pytest_besides_and_nobody_needs_the_plugin():
    optional = {"pytest", "timm", "lightning", "accelerate", "transformers"}

    def forbidden(module):
        return module.split(".")[0] not in STANDARD | {"torch", "mlbfgs"} | optional

    assert violations(sources("mlbfgs/testing"), forbidden) == []
    rest = [p for p in sources("mlbfgs") if "testing" not in p.parts]
    assert violations(rest, lambda m: within(m, "mlbfgs.testing")) == []


def test_collectives_stay_where_processes_are_known():
    allowed = [
        *(ROOT / "mlbfgs" / f"{n}.py" for n in ("collectives", "checkpoint", "distributed_state")),
        *(
            ROOT / "experiments/training" / name
            for name in ("checkpoint_metadata.py", "ranks.py", "sharded_checkpoint.py")
        ),
    ]
    files = [p for p in sources("mlbfgs", "experiments") if p not in allowed]
    # the conformance checks call torch's distributed checkpoint, as its users do
    files = [p for p in files if "testing" not in p.parts]
    assert violations(files, lambda m: within(m, "torch.distributed")) == []


@pytest.mark.parametrize(
    ("room", "may_import"),
    [
        ("runs", ["runs", "given", "yaml_text", "errors"]),
        (
            "training",
            ["training", "runs", "data", "models", "optimizers", "settings", "given", "errors"],
        ),
        (
            "launching",
            ["launching", "training", "runs", "settings", "entry", "supervision", "errors"],
        ),
        (
            "analysis/measuring",
            ["analysis.measuring", "runs.deciding", "given", "yaml_text", "errors"],
        ),
        (
            "analysis/judging",
            [
                "analysis.judging",
                "analysis.measuring",
                "contestants",
                "given",
                "yaml_text",
                "runs.atomic",
                "errors",
            ],
        ),
    ],
)
def test_rooms_know_what_they_are_built_on_alone(room, may_import):
    allowed = [f"experiments.{name}" for name in may_import]

    def forbidden(module):
        return within(module, "experiments") and not within(module, *allowed)

    assert violations(sources(f"experiments/{room}"), forbidden) == []


def test_analysis_knows_run_files_alone():
    def forbidden(module):
        if within(module, "torch", "torchvision", "mlbfgs"):
            return True
        return within(module, "experiments") and not within(
            module,
            "experiments.analysis",
            "experiments.entry",
            "experiments.errors",
            "experiments.given",
            "experiments.contestants",
            "experiments.runs.deciding",
            "experiments.yaml_text",
            "experiments.runs.atomic",
            "experiments.runs.owned_folder",
        )

    assert violations(sources("experiments/analysis"), forbidden) == []
    # Names of config files and keys, and how files are read and written, are all that it may learn
    # besides.
    names = ("contestants", "entry", "errors", "given", "yaml_text")
    names += ("runs/__init__", "runs/deciding", "runs/atomic", "runs/owned_folder", "runs/locks")
    shared = [ROOT / f"experiments/{name}.py" for name in names]

    light = ("errors", "given", "yaml_text", "runs.atomic", "runs.locks")

    def beyond(module):
        own = within(module, *(f"experiments.{n}" for n in light))
        return not own and module.split(".")[0] not in {*STANDARD, "yaml"}

    assert violations(shared, beyond) == []


def test_the_report_knows_files_alone():
    def forbidden(module):
        if within(module, "torch", "torchvision", "mlbfgs"):
            return True
        return within(module, "experiments") and not within(
            module,
            "experiments.report",
            "experiments.analysis",
            "experiments.entry",
            "experiments.errors",
            "experiments.given",
            "experiments.runs.owned_folder",
        )

    assert violations(sources("experiments/report"), forbidden) == []


def test_oracles_do_not_import_what_they_judge():
    oracles = [p for p in sources("tests") if "oracle" in p.name]
    assert violations(oracles, lambda m: within(m, "mlbfgs", "experiments")) == []
    reference = [ROOT / "mlbfgs/reference.py"]
    assert violations(reference, lambda m: within(m, "mlbfgs")) == []


@pytest.mark.parametrize("folder", ["configs", "scripts"])
def test_configs_and_scripts_hold_no_python(folder):
    assert list((ROOT / folder).rglob("*.py")) == []


# Where files may be written, moved or removed without experiments/runs/atomic.py, and why.
WRITES_BY_ITSELF = {
    "runs/atomic.py": "it is the way",
    "runs/owned_folder.py": "removes what its list names",
    "runs/directory.py": "cuts and overwrites files that it holds the lock of",
    "runs/metrics.py": "appends",
    "training/checkpoint.py": "renames a folder before it removes it",
    "training/sharded_checkpoint.py": "makes the folder that torch writes into",
    "training/clock.py": "/proc",
    "data/decoded_cache.py": "makes the cache's folder: a full disk costs a warning",
    "data/synthetic.py": "fills a temporary folder, then renames it",
    "analysis/showing/figures.py": "draws into memory",
    "analysis/showing/theory_figures.py": "draws into memory",
    "benchmarks/data.py": "links images in a temporary folder",
    "entry.py": "/dev/null",
    "faults/__main__.py": "appends to its list of trials",
    "faults/processes.py": "appends to logs",
    "faults/setups.py": "appends to logs",
    "faults/tearing.py": "damages the files of its own trials",
    "faults/trial.py": "makes and removes the folders of its trials",
}
WRITING = {
    *("write_text", "write_bytes", "savefig", "copyfile", "copytree", "copy2", "rmtree", "unlink"),
    *("mkdir", "makedirs", "mkstemp", "rename", "renames", "touch", "symlink_to", "hardlink_to"),
    *("rmdir", "removedirs", "truncate", "ftruncate", "chmod", "to_csv", "tofile"),
}
OF_OS = {"os.replace", "os.remove", "os.link", "os.symlink", "shutil.move", "shutil.copy"}
SAVING = {"torch.save", "np.save", "np.savez", "image.save", "json.dump"}
HANDLES = {"handle", "file", "buffer"}


def is_writing(call: ast.Call) -> bool:
    """Whether a call writes, moves or removes files by itself; into an open file it may."""
    text = ast.unparse(call.func)
    name = text.rpartition(".")[2]
    if name in WRITING or text in OF_OS:
        return True
    if text == "os.open":
        return bool(re.search("O_WRONLY|O_RDWR|O_CREAT", ast.unparse(call)))
    if name in ("open", "fdopen"):
        values = [*call.args, *(keyword.value for keyword in call.keywords)]
        modes = [value.value for value in values if isinstance(value, ast.Constant)]
        return any(re.fullmatch(r"[rbt+]*[wax+][rbt+]*", str(mode)) for mode in modes)
    return text in SAVING and not HANDLES & {ast.unparse(value) for value in call.args}


def writes(path: Path) -> list[str]:
    """Calls of a file that write, move or remove files by themselves."""
    calls = (n for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Call))
    name = path.relative_to(ROOT)
    return [f"{name}:{call.lineno}: {ast.unparse(call)}" for call in calls if is_writing(call)]


def test_files_are_written_by_the_one_module_that_survives_a_full_disk_and_follows_no_link():
    files = [
        p
        for p in sources("experiments")
        if str(p.relative_to(ROOT / "experiments")) not in WRITES_BY_ITSELF
    ]
    assert [line for path in files for line in writes(path)] == []
    for name in WRITES_BY_ITSELF:
        assert writes(ROOT / "experiments" / name), f"{name} no longer writes: strike it out"
