#!/bin/bash
# Ten minutes on one GPU: does everything work there? One JSON, results/benchmarks/gpu_check.json.
# Run it from the project's root; further options as of python -m experiments.gpu_check --help.
set -u
python=.venv/bin/python
[ -x "$python" ] || python=python3
exec "$python" -m experiments.gpu_check --device cuda "$@"
