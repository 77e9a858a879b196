"""Benchmarks: each writes one JSON file and one Markdown table into results/benchmarks/."""
