"""Check in a minute whether a server computes a PLT, and if not, which mechanism it lacks."""

from .check import Answer, Verdict, check, check_checkpoint, check_endpoint, write_probe

__all__ = ["Answer", "Verdict", "check", "check_checkpoint", "check_endpoint", "write_probe"]
