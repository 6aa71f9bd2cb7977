"""Emulated devices: several of one CPU, for tests and trials of a pod."""

from __future__ import annotations

import re

ORDERED = "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"


def emulated(flags: str) -> int:
    """The number of devices of the CPU that these XLA_FLAGS request, 0 where they request none."""
    counts = re.findall(r"--xla_force_host_platform_device_count=(\d+)", flags)
    return int(counts[-1]) if counts else 0  # of a flag given twice the last counts


def ordered(flags: str) -> str:
    """XLA_FLAGS with which the devices of a CPU rarely meet in the wrong collective; a schedule chosen there stays.

    XLA's CPU programs are run by threads, each step when what it reads is there. Collectives keep the order of the
    program, but a loop counts as passed when it has begun: a collective behind it that reads nothing of it may run
    while other devices are still at those inside. Then devices wait for each other without end, or exchange the wrong
    arrays. Scheduled for least memory, steps use the same buffers again, and most then wait for the loop because of
    them. Without a loop it cannot happen, but layers are not always unrolled (`models/transformer.py`).
    Accelerators run the collectives of a program one by one.
    """
    return flags if "--xla_cpu_scheduler_type" in flags else f"{flags} {ORDERED}".strip()
