"""The argument that a cache is passed by: `cache` from transformers 5.24 on, before that `past_key_values`.

The model is written with `cache` and can be called by either name. Where the library gives it a cache or reads one (generate(), masks,
checkpointed layers, fields of outputs), the name is the installed version's, CACHE.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE = "cache" if hasattr(BaseModelOutputWithPast, "cache") else "past_key_values"

F = TypeVar("F", bound=Callable)


def takes_cache(function: F) -> F:
    """Let a function with an argument `cache` be called with `past_key_values`, too.

    Its signature shows the installed version's name, since generate() refuses arguments that forward() does not show.

    Raises:
        ValueError: when called with a cache by each name.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = kwargs.pop("past_key_values", None)
        if given is not None:
            if kwargs.get("cache") is not None:
                raise ValueError(
                    "Both cache and past_key_values hold a cache: they name the same argument, pass one of them."
                )
            kwargs["cache"] = given
        return function(*args, **kwargs)

    names = {"cache": CACHE}
    shown = [parameter.replace(name=names.get(name, name)) for name, parameter in signature.parameters.items()]
    call.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]
