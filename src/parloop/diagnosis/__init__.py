from .diagnosis import Diagnosis, DiagnosisError, diagnose

__all__ = ["Diagnosis", "DiagnosisError", "diagnose"]
