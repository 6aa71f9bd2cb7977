"""Memory checks of a run, before anything is allocated."""

from __future__ import annotations

import math
import pathlib
from typing import Any

import jax

from src.common.tree import count_parameters
from src.train.average import further
from src.train.system import System
from src.train.teacher import teacher_selector
from src.train.trainable import split
from src.train.trainer import Trainer, make_optimizer

GIB = 2**30
FROZEN = 8  # bytes per weight: float32 parameter and average
GRADIENT = 4  # bytes per weight
LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current")
ELSEWHERE = (
    "run it on more or larger devices, or ask `python -m src.tools.aot --config=…` which pod it fits (nothing is"
    " allocated there)"
)


def check_state(system: System) -> None:
    """Raises ValueError when parameters, average, moments, gradients and the frozen encoders (a copy on each device)
    need more memory than all devices have together.

    Compiles nothing and leaves out activations; `check_step` counts them.
    """
    have = free_memory()
    shapes = jax.eval_shape(system.init, jax.random.key(0))
    count, trained = count_parameters(shapes), count_parameters(split(shapes, system.config)[0])
    moments = jax.eval_shape(make_optimizer(system.config, shapes)[0].init, shapes)
    need = count * (FROZEN + 4 * len(further(system.config.ema))) + trained * GRADIENT + _bytes(moments)
    if (keep := teacher_selector(system)) is not None:
        need += _bytes(jax.eval_shape(keep, shapes))
    encoders = system.encoder_bytes() * (jax.local_device_count() if _shared() else jax.device_count())
    devices, need = 1 if _shared() else jax.device_count(), need + encoders
    if have is not None and need > have * devices:
        besides = f" ({encoders / GIB:.1f} of it frozen encoders)" if encoders else ""
        raise ValueError(
            f"{count:,} parameters with average, moments and gradients take {need / GIB:.1f} GiB{besides}, but this"
            f" machine has {have * devices / GIB:.1f} GiB: {ELSEWHERE}"
        )


def check_encoding(trainer: Trainer) -> int | None:
    """Bytes per device for the program of the frozen encoders and the state; None without such a program, or if the
    compiler does not report memory. Call it before anything is allocated.

    Raises ValueError when a device has less free. The compiled program is cached for training.
    """
    lowered = trainer.lower_encode()
    found = None if lowered is None else lowered.compile().memory_analysis()
    if found is None:
        return None
    need = found.temp_size_in_bytes + found.output_size_in_bytes
    need += _local(trainer.encoder_shapes()) + _local(trainer.raw_batch()) + _local(trainer.abstract)
    rows = " or ".join(f"fields.{row}.codec.frozen.rows" for row in trainer.system.encoders.nets)
    return _fitting(trainer, need, "encoding before a step", f"lower {rows}, or batch")


def _fitting(trainer: Trainer, need: int, what: str, advice: str) -> int:
    """`need`, bytes per device. Raises ValueError when a device has less free."""
    have, sharing = free_memory(), len(trainer.mesh.local_devices) if _shared() else 1
    if have is not None and need * sharing > have:
        raise ValueError(
            f"{what} takes {need * sharing / GIB:.1f} GiB, but {have / GIB:.1f} GiB are free: {advice}, or {ELSEWHERE}"
        )
    return need


def _bytes(tree: Any) -> int:
    """Bytes of abstract arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _local(tree: Any) -> int:
    """Bytes of abstract arrays on one device."""
    return sum(math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize for s in jax.tree.leaves(tree))


def check_step(trainer: Trainer, update: Any) -> int | None:
    """Bytes per device for the compiled step, or None if the compiler does not report memory.

    Adds the next batch, which is encoded while the step runs; frozen encoders are already allocated.
    Raises ValueError when a device has less free.
    """
    found = update.memory_analysis()
    if found is None:
        return None
    need = found.temp_size_in_bytes + found.argument_size_in_bytes
    need += max(found.output_size_in_bytes - found.alias_size_in_bytes, 0)
    if trainer.system.encoders.nets:
        need += _local(trainer.raw_batch()) + _local(trainer.batch())
    return _fitting(trainer, need, "a step", "lower batch, raise accumulate, set model.trunk.remat to names or full")


def free_memory() -> int | None:
    """Free bytes of one accelerator, or of the whole machine if its devices are CPUs; None if unknown."""
    stats = jax.local_devices()[0].memory_stats()
    if not _shared():
        return stats["bytes_limit"] - stats["bytes_in_use"] if stats and "bytes_limit" in stats else None
    free = []
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        most, used = (pathlib.Path(path).read_text().strip() for path in LIMITS)
        free += [int(most) - int(used)] if most != "max" else []
    except (OSError, ValueError):
        pass
    return min(free, default=None)


def _shared() -> bool:
    return jax.local_devices()[0].platform == "cpu"
