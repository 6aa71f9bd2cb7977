"""Limits of the shell on the memory of a process, before libraries meet them and abort without a sentence."""

from __future__ import annotations

import importlib.util

# Bytes. The debug variant of digits is aborted with 2.0e9 of address space and trains with 2.5e9; of data it fails with
# 0.92e9 and trains with 1.23e9.
LIMITS = {"RLIMIT_AS": ("ulimit -v", "address space", 2.4e9), "RLIMIT_DATA": ("ulimit -d", "data", 1.2e9)}
ROOM = 8e9  # below it, a warning


def check_memory() -> str:
    """A warning where the limits of this process are so low that a library may abort it, else "".

    Raises MemoryError, in one sentence, where JAX cannot work at all.
    """
    if importlib.util.find_spec("resource") is None:  # not on every system
        return ""
    import resource

    for name, (command, kind, least) in LIMITS.items():
        most = resource.getrlimit(getattr(resource, name))[0]
        if most == resource.RLIM_INFINITY or most >= ROOM:
            continue
        told = f"the memory of this process is limited to {most / 1e9:.2g} GB of {kind} ({command})"
        if most < least:
            raise MemoryError(
                f"{told}, and JAX needs at least {least / 1e9:.2g} GB: raise the limit ({command} unlimited)"
            )
        return f"{told}: if a library aborts the process, raise the limit ({command} unlimited)"
    return ""
