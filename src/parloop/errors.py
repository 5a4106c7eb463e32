"""Errors that a user can correct. Messages name the value and the remedy; the command line prints them without a traceback."""


class ParloopError(Exception):
    """Base class of parloop's errors."""


class SourceError(ParloopError, ValueError):
    """A source that cannot be read at all."""


class OutputError(ParloopError, RuntimeError):
    """A folder or file that cannot be written: it belongs to something else, another file is in the way, or the disk fails."""


class RecipeError(ParloopError, ValueError):
    """A recipe that cannot be run."""


class TrainingDivergedError(ParloopError, RuntimeError):
    """The loss became NaN or diverged."""


class CheckpointError(ParloopError, ValueError):
    """A checkpoint that cannot be loaded."""


class ConvertError(ParloopError, ValueError):
    """A checkpoint that cannot be converted."""


class ExportError(ParloopError, ValueError):
    """A checkpoint that cannot be written in another format."""


class QuantizeError(ParloopError, ValueError):
    """A checkpoint that cannot be quantised."""


class DiagnosisError(ParloopError, ValueError):
    """Something that cannot be diagnosed."""


class BenchError(ParloopError, ValueError):
    """Something that cannot be measured."""


class ServeError(ParloopError, ValueError):
    """A server that cannot be started."""


class PortCheckError(ParloopError, RuntimeError):
    """A server that cannot be checked."""


class EvaluationError(ParloopError, RuntimeError):
    """A benchmark that cannot be run, or that gave no result."""


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, with the exception's type if the message alone says little."""
    text = str(error).strip().partition("\n")[0].rstrip(".:")
    plain = isinstance(error, (OSError, ValueError, RuntimeError, ImportError, AssertionError))
    return text if text and plain else f"{type(error).__name__}: {text}".rstrip(": ")
