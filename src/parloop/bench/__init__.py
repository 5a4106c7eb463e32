from .bench import run_bench

__all__ = ["run_bench"]
