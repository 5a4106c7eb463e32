from .bench import run_bench
from .models import BenchError

__all__ = ["BenchError", "run_bench"]
