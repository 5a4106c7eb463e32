from .conversion import Converted, convert

__all__ = ["Converted", "convert"]
