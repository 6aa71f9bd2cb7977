"""Devices of a run on a CPU: one for each core, over which the rows of a batch are split.

XLA uses one core for most of a small step; with a device for each core all of them work. JAX has to be told their
number before its first use. It is kept in the workdir, because another number adds in another order: a run that goes
on with the same number has the same bits.
"""

from __future__ import annotations

import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging
from etils import epath

from src.common.files.store import write_named
from src.common.files.strict_json import read_json
from src.common.mesh import distributed, emulation
from src.common.mesh.sharding import BATCH_AXES
from src.common.runtime.cores import physical_cores

FILE = "cpu_devices.json"  # in the workdir
FLAG = "--cpu_devices"
CROWDED = 4  # devices of a core, above which there is a warning
LISTED = 64  # the most devices that a message proposes
VOCABULARY, BYTES = 2**16, 24  # most words, and bytes of a weight in training, for `_state_bytes`
MEMORY = 0.5  # share of the free memory that the copies of the state may take


def start(
    config: Any,
    rows: Mapping[str, int],
    asked: int | None = None,
    workdir: str | os.PathLike[str] | None = None,
    training: bool = False,
) -> str:
    """Sets the number of JAX's CPU devices, and tells it with its reason in a sentence; "" where there is no choice.
    Call it before the first use of JAX's devices, and before `distributed.start`.

    rows      of each task in a batch
    asked     the value of --cpu_devices
    workdir   of a run whose number is kept
    training  whether a run goes on there

    A number that the environment sets stays, and so do accelerators and runs of several processes. Raises ValueError,
    in one sentence, for a number that is asked for and cannot be.
    """
    if asked is not None and asked < 1:
        raise ValueError(f"{FLAG}={asked} is no number of devices: give at least 1")
    fixed, source = _environment()
    if reason := _elsewhere():
        if asked is not None:
            raise ValueError(f"{FLAG}={asked} is for one process on CPUs, but {reason}")
        return ""
    if asked is not None and fixed is not None and fixed != asked:
        raise ValueError(f"{FLAG}={asked}, but {source} sets {fixed} devices: leave out one of the two")
    if asked is not None:
        _check(asked, config, rows)
        if fixed is None:
            _set(asked)
        return _told(asked, f"{FLAG} says so")
    if fixed is not None:
        return _told(fixed, f"{source} says so")
    count, reason = _chosen(config, rows, workdir, training)
    try:
        _set(count)
    except RuntimeError:  # JAX is in use already, by the program that calls
        return ""
    return _told(count, f"{reason}; {FLAG} sets another number") if reason else ""


def keep(workdir: str | os.PathLike[str]) -> None:
    """Writes the number of devices into the workdir of a run on a CPU; for the process that trains there. A file that
    cannot be written causes a warning. Nothing where there is no workdir."""
    if jax.process_count() > 1 or jax.default_backend() != "cpu" or not epath.Path(workdir).is_dir():
        return
    count = jax.device_count()
    if _kept(workdir) == count:
        return
    try:
        write_named(epath.Path(workdir) / FILE, json.dumps({"cpu_devices": count}).encode(), "the number of devices")
    except OSError as error:
        logging.warning("%s; a run that goes on elsewhere may have another number", error)


def _chosen(config: Any, rows: Mapping[str, int], workdir: Any, training: bool) -> tuple[int, str]:
    """The number of devices, and why it is that; "" where there is nothing to tell."""
    cores = physical_cores()
    kept = None if workdir is None else _kept(workdir)
    if kept is not None and kept <= cores and _divides(kept, config, rows):
        return kept, f"with which the run in {workdir} began"
    best, reason = _best(cores, config, rows)
    if kept is not None and kept != best:
        why = f"this machine has {cores} core{'s' * (cores > 1)}" if kept > cores else "that does not fit this config"
        return best, f"not {kept}, with which the run in {workdir} began, since {why}"
    if kept is None and training and workdir is not None and best > 1 and _began(workdir):
        return 1, f"since the run in {workdir} keeps no number and began with 1"
    return best, reason


def _best(cores: int, config: Any, rows: Mapping[str, int]) -> tuple[int, str]:
    """The most devices, at most one a core, that split rows alone, divide them, and leave memory; and why so many."""
    if cores == 1:
        return 1, ""
    split = [f"mesh.{axis}={size}" for axis, size in config.mesh.items() if axis != "data" and size != 1]
    if split:  # collectives inside of loops are not safe on a CPU (`emulation.ordered`)
        return 1, f"since {split[0]} splits more than rows"
    fits = [count for count in range(1, cores + 1) if _divides(count, config, rows)]
    room = [count for count in fits if count == 1 or _has_memory(count, config)]
    best = max(room, default=1)
    if best == cores:
        return best, "one for each core"
    if room != fits:
        return best, f"on {cores} cores, since more copies of the model would leave little memory"
    sizes = ", ".join(map(str, rows.values()))
    return best, f"on {cores} cores, the most that mesh.data={config.mesh.data} and rows of {sizes} a task allow"


def _check(asked: int, config: Any, rows: Mapping[str, int]) -> None:
    """Raises ValueError unless the mesh and the rows of the config allow so many devices."""
    ways = _row_shards(asked, config.mesh)
    if ways is None:
        sizes = {axis: size for axis, size in config.mesh.items() if axis in BATCH_AXES or size != 1}
        rest = math.prod(size for size in sizes.values() if size != -1)
        advice = f"a multiple of {rest}" if -1 in sizes.values() else f"{rest}, or set mesh.data to -1"
        asks = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        raise ValueError(f"{FLAG}={asked} does not fit mesh ({asks}) of the config: give {advice}")
    for task, count in rows.items():
        if count % (ways * config.accumulate):
            able = [n for n in range(1, max(LISTED, asked) + 1) if _divides(n, config, rows)]
            advice = f"give {' or '.join(map(str, able))}, or change batch" if able else "change batch or accumulate"
            raise ValueError(
                f"{FLAG}={asked} does not divide the {count} rows of the task {task}"
                f"{f' in {config.accumulate} microbatches' * (config.accumulate > 1)}: {advice}"
            )
    if asked > CROWDED * physical_cores():
        logging.warning("%s=%d is more than %d devices for each core, which is slow", FLAG, asked, CROWDED)


def _divides(count: int, config: Any, rows: Mapping[str, int]) -> bool:
    """Whether `count` devices fit the mesh and the rows of every task, as `make_trainer` wants them."""
    ways = _row_shards(count, config.mesh)
    return ways is not None and not any(each % (ways * config.accumulate) for each in rows.values())


def _row_shards(count: int, mesh: Mapping[str, int]) -> int | None:
    """Parts of the rows on a mesh of `count` devices, None where it does not fit (`sharding.make_mesh`)."""
    rest = math.prod(size for size in mesh.values() if size != -1)
    if rest < 1 or count % rest or (count != rest and -1 not in mesh.values()):
        return None
    return math.prod(count // rest if mesh.get(axis, 1) == -1 else mesh.get(axis, 1) for axis in BATCH_AXES)


def _has_memory(count: int, config: Any) -> bool:
    """Whether `count` copies of the state take at most `MEMORY` of what is free; True where that is unknown."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, ValueError, StopIteration):
        return True
    return count * _state_bytes(config.model.trunk) <= MEMORY * free


def _state_bytes(trunk: Any) -> int:
    """About the bytes of a train state, rather too many: the vocabulary and the data are not known yet."""
    width = trunk.width
    layer = 4 * width**2 + 3 * width * trunk.mlp_width
    layers = trunk.depth * (layer * (2 if trunk.mot else 1) + 6 * width**2)
    return BYTES * (layers + 2 * VOCABULARY * width)


def _set(count: int) -> None:
    """Raises RuntimeError where JAX is in use already."""
    if count > 1:
        jax.config.update("jax_num_cpu_devices", count)


def _told(count: int, reason: str) -> str:
    return f"{count} CPU device{'s' * (count > 1)}, {reason}"


def _environment() -> tuple[int | None, str]:
    """The number that the environment sets, and the variable that does; None and "" where none does."""
    if jax.config.jax_num_cpu_devices > 0:
        return jax.config.jax_num_cpu_devices, "JAX_NUM_CPU_DEVICES"
    count = emulation.emulated(os.environ.get("XLA_FLAGS", ""))
    return (count, "XLA_FLAGS") if count else (None, "")


def _elsewhere() -> str:
    """Why the devices are no CPUs of one process, or ""."""
    if distributed.is_named(os.environ):
        return "this is one of several: set XLA_FLAGS=--xla_force_host_platform_device_count for each of them"
    platforms = (jax.config.jax_platforms or "").split(",")[0]
    if platforms not in ("", "cpu") or (not platforms and distributed.has_accelerator()):
        return "this machine has an accelerator: set JAX_PLATFORMS=cpu to leave it alone"
    return ""


def _kept(workdir: str | os.PathLike[str]) -> int | None:
    """The number of devices of the run in a workdir, None where none is kept; a file that holds no number causes a
    warning."""
    path = epath.Path(workdir) / FILE
    try:
        found = read_json(path, limit=1000)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logging.warning("%s; the number of devices is chosen anew", error)
        return None
    count = found.get("cpu_devices") if isinstance(found, dict) else None
    if isinstance(count, int) and not isinstance(count, bool) and count > 0:
        return count
    logging.warning("%s holds no number of devices; it is chosen anew", path)
    return None


def _began(workdir: str | os.PathLike[str]) -> bool:
    """Whether a run has saved something in a workdir."""
    folder = epath.Path(workdir) / "checkpoints"
    try:
        return folder.is_dir() and any(folder.iterdir())
    except OSError:
        return False
