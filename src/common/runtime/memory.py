"""Memory that a process uses, for the log."""

from __future__ import annotations

import os
import pathlib
import resource
import sys

import jax

GIB = 2**30
MEMORY = ("device_memory_gib", "process_memory_gib")


def memory_in_use() -> dict[str, float]:
    """`device_memory_gib`: the peak since the start, of the device of this process that has most; where devices do not
    tell, `process_memory_gib`: the resident memory of this process."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [each["peak_bytes_in_use"] for each in stats if "peak_bytes_in_use" in each]
    return {MEMORY[0]: max(peaks) / GIB} if peaks else {MEMORY[1]: resident() / GIB}


def resident() -> int:
    """Bytes of resident memory; where the system does not tell, their peak."""
    try:
        return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
