"""Messages of the program for errors: one sentence, however long the runtime's own text is."""

from __future__ import annotations

import dataclasses
import errno
import os
import re

LONGEST = 400  # characters of a runtime's own words
ADVICE = (
    "a smaller --config.batch, --config.accumulate=2 or more, --config.model.trunk.remat=full,"
    " --config.optim.moments=bfloat16 or factored, or --config.mesh.fsdp over more devices;"
    " python -m src.tools.aot --help shows how to see beforehand what fits"
)
HOST = "free memory, raise the limit, or choose a smaller --config.batch or model"


@dataclasses.dataclass(frozen=True)
class Cause:
    """A kind of failure of a disk: what it is called, the error numbers and what to do; `{}` is the folder."""

    called: str
    numbers: tuple[int, ...]
    advice: str


FULL = Cause("the disk is full", (errno.ENOSPC, errno.EDQUOT), "free space in {}")
CAUSES = (
    FULL,
    Cause("too many files are open", (errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
    Cause("a file is too large", (errno.EFBIG,),
          "raise the limit of a file's size (ulimit -f), or choose a --workdir whose file system takes larger files"),
    Cause("the disk is read-only", (errno.EROFS,), "mount {} for writing, or choose another --workdir"),
    Cause("it is not allowed", (errno.EPERM, errno.EACCES),
          "get the right to write in {} (owner, mode, attributes), or choose another --workdir"),
    Cause("there is no such folder", (errno.ENOENT, errno.ENOTDIR), "see who removed or replaced what was in {}"),
    Cause("the memory does not suffice", (errno.ENOMEM,), "free memory, or raise its limit (ulimit -v)"),
    Cause("the disk or network fails", (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN),
          "look at the disk or network of {} (dmesg)"),
)  # fmt: skip
LIMITS = tuple(
    cause for cause in CAUSES if set(cause.numbers) & {errno.ENOSPC, errno.EMFILE, errno.EFBIG, errno.ENOMEM}
)
OTHER = "look at the disk or store of {}"


def explain(error: BaseException) -> str:
    """An error of a disk in one line; one of `CAUSES` is called by its name, wherever in a chain of errors it is."""
    chain, seen = [], error
    while seen is not None and seen not in chain:
        chain.append(seen)
        seen = seen.__cause__ or seen.__context__
    codes = {getattr(each, "errno", None) for each in chain}
    texts = " ".join(map(str, chain)).lower()  # libraries in C++ give text alone
    for cause in CAUSES:
        if codes.intersection(cause.numbers) or any(os.strerror(n).lower() in texts for n in cause.numbers):
            return f"{cause.called} ({brief(error)})"
    return brief(error)


def way_out(reason: str, folder: object) -> str:
    """What to do about a reason that `explain` gave."""
    known = (cause.advice for cause in CAUSES if f"{cause.called} (" in reason)
    return next(known, OTHER).format(folder)


def in_words(error: BaseException) -> str:
    """The error in one sentence.

    Running out of a device's memory (RESOURCE_EXHAUSTED of XLA, when compiling or running) gets the ways out of it;
    other errors of the runtime are cut after `LONGEST` characters. All else is told as it is, our own sentences that
    quote a runtime's with it.
    """
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
    if isinstance(error, MemoryError):
        return text if " " in text else f"the memory of this machine or its limit (ulimit -v) does not suffice: {HOST}"
    if not type(error).__module__.startswith(("jax", "xla")):
        return text
    if _is_out_of_memory(text):
        sizes = re.search(r"(allocat\w+ [\d.]+ ?(?:bytes|[KMGT]?i?B)?|[Uu]sed [\d.]+\w* of [\d.]+\w*)", text)
        size = f" ({sizes.group(1).strip()})" if sizes else ""
        return f"the device has not enough memory{size}: try {ADVICE}"
    flat = " ".join(text.split())
    return flat if len(flat) <= LONGEST else f"{flat[:LONGEST]}… (--traceback shows all of it)"


def brief(error: BaseException, limit: int = 200) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:limit]}{'…' if len(text) > limit else ''}"


def _is_out_of_memory(text: str) -> bool:
    # A full disk has the same code.
    return "RESOURCE_EXHAUSTED" in text and "No space left" not in text
