from .diagnosis import Diagnosis, diagnose

__all__ = ["Diagnosis", "diagnose"]
