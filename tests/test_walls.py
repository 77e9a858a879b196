"""The walls between the rooms (docs/architecture.md), kept over the imports of every file."""

import ast
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
        *(ROOT / "mlbfgs" / name for name in ("collectives.py", "checkpoint.py")),
        *(ROOT / "experiments/training" / name for name in ("ranks.py", "sharded_checkpoint.py")),
    ]
    files = [p for p in sources("mlbfgs", "experiments") if p not in allowed]
    # the conformance checks call torch's distributed checkpoint, as its users do
    files = [p for p in files if "testing" not in p.parts]
    assert violations(files, lambda m: within(m, "torch.distributed")) == []


@pytest.mark.parametrize(
    ("room", "may_import"),
    [
        ("runs", ["runs", "errors", "yaml_text"]),
        (
            "training",
            ["training", "runs", "data", "models", "optimizers", "settings", "errors"],
        ),
        ("launching", ["launching", "training", "runs", "settings", "supervision", "errors"]),
        ("analysis/measuring", ["analysis.measuring", "runs.deciding", "errors", "yaml_text"]),
        (
            "analysis/judging",
            ["analysis.judging", "analysis.measuring", "contestants", "errors", "yaml_text"],
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
            "experiments.errors",
            "experiments.contestants",
            "experiments.runs.deciding",
            "experiments.yaml_text",
        )

    assert violations(sources("experiments/analysis"), forbidden) == []
    # Names of config files and keys are all that it may learn besides.
    names = ("contestants", "errors", "runs/__init__", "runs/deciding")
    shared = [ROOT / f"experiments/{name}.py" for name in names]
    assert violations(shared, lambda m: m.split(".")[0] not in STANDARD) == []


def test_the_report_knows_files_alone():
    def forbidden(module):
        if within(module, "torch", "torchvision", "mlbfgs"):
            return True
        return within(module, "experiments") and not within(
            module, "experiments.report", "experiments.analysis", "experiments.errors"
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
