"""Worker processes of a stream: what they need of this process and of the machine."""

from __future__ import annotations

import shutil

SHARED = "/dev/shm"


def allow_workers() -> None:
    """Lets Grain start workers: they read absl's flags, which nobody has parsed in a test or notebook."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


def shared_memory_lacks(workers: int) -> str:
    """A sentence for a machine whose shared memory is too small for the batches that workers hand over."""
    try:
        size = f", {shutil.disk_usage(SHARED).total / 1e6:.3g} MB"
    except OSError:
        size = ""
    return (
        f"the shared memory ({SHARED}{size}) is too small for the batches of data.workers={workers}: give it more, such"
        " as docker run --shm-size=8g, or set data.workers=0, which reads with threads"
    )
