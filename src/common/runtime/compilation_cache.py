"""Compiled programs are kept on disk for the next start, and a damaged or missing cache never stops a run.

JAX compiles what it cannot read from the cache, but leaves the damaged file where it is: without help, that program
would be compiled at every start from then on.
"""

from __future__ import annotations

import builtins
import os
import re
import warnings
from typing import Any

import jax
from absl import logging
from etils import epath

from src.common.files.store import cache_folder

DAMAGED = re.compile(r"Error reading persistent compilation cache entry for '([^']+)': (\w+): (.*)", re.DOTALL)


def use_program_cache(named: bool = False) -> None:
    """Keeps compiled programs in `cache_folder()/xla`, unless JAX has another folder; removes damaged ones.

    With `named` it finds only programs whose operations have the names of the code of now, which a trace shows.
    """
    jax.config.update("jax_compilation_cache_include_metadata_in_key", named)
    if jax.config.jax_compilation_cache_dir is None:
        folder = os.path.join(cache_folder(), "xla")
        try:
            os.makedirs(folder, exist_ok=True)
            reason = "" if os.access(folder, os.W_OK | os.X_OK) else "no right to write"
        except OSError as error:
            reason = error.strerror or str(error)
        if reason:
            logging.warning("Programs are compiled at every start: %s cannot be written (%s).", folder, reason)
            return
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    if not isinstance(warnings.showwarning, _Mender):
        warnings.showwarning = _Mender(warnings.showwarning)


class _Mender:
    """Shows warnings as before, except those of damaged entries, which it removes before JAX writes them again."""

    def __init__(self, show: Any):
        self.show = show

    def __call__(self, message: Any, category: Any, *where: Any, **more: Any) -> None:
        found = DAMAGED.match(str(message))
        folder = jax.config.jax_compilation_cache_dir
        kind = getattr(builtins, found[2], Exception) if found else None
        if not found or not folder or issubclass(kind, OSError):  # a folder that is away has no damaged file
            self.show(message, category, *where, **more)
            return
        # The file is unknown: those of the same name, for other shapes, can be made again, too.
        entries = list(epath.Path(folder).glob(f"{found[1]}-*-cache"))
        logging.warning(
            "Damaged compilation cache in %s (%s: %s): compiling %s again.", folder, found[2], found[3], found[1]
        )
        for entry in entries:
            try:
                entry.unlink()
            except Exception:  # it stays, and is compiled at the next start, too
                return
