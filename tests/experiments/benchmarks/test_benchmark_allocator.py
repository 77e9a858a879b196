import json
import os
import sys

import pytest

from experiments.benchmarks import allocator

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux") or "glibc" not in os.confstr("CS_GNU_LIBC_VERSION"),
    reason="needs glibc",
)


@pytest.mark.slow
def test_allocator_benchmark_writes_what_it_prints(tmp_path, capsys, monkeypatch):
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    asked = ["--rounds", "2", "--batch", "128", "--experiments", "ablation"]
    assert allocator.main([*asked, "--out", str(tmp_path)]) == 0
    page = (tmp_path / "allocator.md").read_text()
    assert capsys.readouterr().out.strip() == page.strip()
    (one,) = json.loads((tmp_path / "allocator.json").read_text())["experiments"].values()
    # Activations of 128 images of ResNet-8, width 8, are blocks of 4 MiB: faults are what is saved.
    assert one["page_faults"]["kept"] < 0.2 * one["page_faults"]["given_back"]
    assert f"{one['given_back_over_kept']:.2f}" in page
