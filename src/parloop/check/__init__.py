"""One minute with any server: does it compute a PLT, and if not, which mechanism does it lack?"""

from .check import Answer, Verdict, check, check_checkpoint, check_endpoint, write_probe

__all__ = ["Answer", "Verdict", "check", "check_checkpoint", "check_endpoint", "write_probe"]
