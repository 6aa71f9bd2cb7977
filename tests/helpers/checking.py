"""The checker of types and shapes that the tests put around every function of `src`."""

import inspect

from beartype import beartype

_made = {}


def checked(function):
    """`beartype`, made once for a function inside another one, which is defined anew at every call of that one.

    jaxtyping gives stubs, which have the names and annotations of the function and nothing else of it.
    """
    if "<locals>" not in getattr(function, "__qualname__", ""):
        return beartype(function)
    key = function.__module__, function.__qualname__, str(inspect.signature(function))
    if key not in _made:
        _made[key] = beartype(function)
    return _made[key]
