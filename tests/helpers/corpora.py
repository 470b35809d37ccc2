"""Real dumps, where they are beside the checkout, and the benchmark over them."""

import importlib.util
from pathlib import Path

_path = Path(__file__).parents[2] / "benchmarks/clean.py"
_spec = importlib.util.spec_from_file_location("benchmark_clean", _path)
benchmark = importlib.util.module_from_spec(_spec)
