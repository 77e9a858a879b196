"""The wheel holds the optimizer alone and asks for torch alone."""

import email
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in ("mlbfgs", "experiments"):
        shutil.copytree(
            ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__")
        )
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "out", "."]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (source / "out").glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_it_contains_mlbfgs_and_nothing_else(wheel):
    names = wheel.namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"mlbfgs"}
    assert "mlbfgs/py.typed" in names and "mlbfgs/testing/plugin.py" in names
    files = {p.relative_to(ROOT).as_posix() for p in (ROOT / "mlbfgs").rglob("*.py")}
    assert files <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_it_needs_torch_alone(wheel):
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    requirements = email.message_from_bytes(wheel.read(name)).get_all("Requires-Dist")
    assert [r for r in requirements if "extra ==" not in r] == ["torch>=2.6"]
    extras = {r.rsplit("extra ==", 1)[1].strip(" \"'") for r in requirements if "extra ==" in r}
    assert extras == {"suite", "dev", "shampoo", "slurm"}
