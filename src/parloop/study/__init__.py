from .arms import Arm
from .results import StudyResult
from .study import run_study

__all__ = ["Arm", "StudyResult", "run_study"]
