"""The benchmark of benchmarks/clean.py as a module: it finds the real dumps (`DATA`) and measures conversions of them."""

import importlib.util
from pathlib import Path

_path = Path(__file__).parents[2] / "benchmarks/clean.py"
_spec = importlib.util.spec_from_file_location("benchmark_clean", _path)
benchmark = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(benchmark)
