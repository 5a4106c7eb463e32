from .bench import run_bench
from .results import BenchResult

__all__ = ["BenchResult", "run_bench"]
