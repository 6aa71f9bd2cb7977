"""Messages of the program for errors: one sentence, however long the runtime's own text is."""

from __future__ import annotations

import re

LONGEST = 400  # characters of a runtime's own words
ADVICE = (
    "a smaller --config.batch, --config.accumulate=2 or more, --config.model.trunk.remat=full,"
    " --config.optim.moments=bfloat16 or factored, or --config.mesh.fsdp over more devices;"
    " python -m src.tools.aot --help shows how to see beforehand what fits"
)


def in_words(error: BaseException) -> str:
    """The error in one sentence.

    Running out of a device's memory (RESOURCE_EXHAUSTED of XLA, when compiling or running) gets the ways out of it;
    other errors of the runtime are cut after `LONGEST` characters. All else is told as it is, our own sentences that
    quote a runtime's with it.
    """
    text = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
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
