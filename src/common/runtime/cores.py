"""Cores that this process may use: its affinity, without hyper-threads, and the quota of its control group."""

from __future__ import annotations

import math
import os
import pathlib
from collections.abc import Iterator

ROOT = pathlib.Path("/")


def physical_cores(root: pathlib.Path = ROOT) -> int:
    """Number of physical cores for this process, at least 1.

    root   of the file system that `proc` and `sys` are read from; what is not there limits nothing
    """
    try:
        mine = os.sched_getaffinity(0)
    except AttributeError:  # not on every system
        return os.cpu_count() or 1
    cores = {_siblings(root, number) for number in mine}
    return max(1, math.floor(min([len(cores), *_quotas(root)])))


def _siblings(root: pathlib.Path, number: int) -> str:
    """The logical processors of one core, as the kernel writes them."""
    return _text(root / f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list") or str(number)


def _quotas(root: pathlib.Path) -> Iterator[float]:
    """Processors that the control groups of this process, and those above them, may use at a time."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers not in ("", "cpu", "cpu,cpuacct"):
            continue
        base = root / "sys/fs/cgroup" / controllers
        group = base / path.strip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(base):
                break
            words = _text(folder / "cpu.max").split() if not controllers else _first_version(folder)
            if len(words) == 2 and all(word.isdecimal() and int(word) for word in words):  # "max": no limit
                yield int(words[0]) / int(words[1])


def _first_version(folder: pathlib.Path) -> list[str]:
    return [_text(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, ValueError):
        return ""
