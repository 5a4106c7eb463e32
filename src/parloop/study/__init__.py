from .study import run_study

__all__ = ["run_study"]
