"""What the bench measures with: clocks, the machine's name, the device's matmul peak, and memory."""

from __future__ import annotations

import datetime
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

PEAK_SIZES = {"cpu": 2048, "gpu": 8192, "tpu": 8192}
ADDED = ("temp_size_in_bytes", "output_size_in_bytes", "argument_size_in_bytes", "generated_code_size_in_bytes")


def where() -> dict[str, str]:
    """Machine, jax version and date: what every group of figures carries."""
    device = jax.devices()[0]
    name = device.device_kind if device.platform != "cpu" else _processor()
    devices = f"{jax.device_count()} device{'s' * (jax.device_count() > 1)}"
    count = f"{os.cpu_count()} cores, {devices}" if device.platform == "cpu" else devices
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"machine": f"{name}, {count}", "jax": jax.__version__, "python": platform.python_version(), "date": now}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            lines = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        lines = []
    return lines[0] if lines else platform.processor() or platform.machine()


def spread(seconds: Sequence[float]) -> dict[str, Any]:
    """Median, 10th and 90th percentile (nearest of the measured values) and their number."""
    ordered = sorted(seconds)
    at = lambda share: ordered[round(share * (len(ordered) - 1))]
    return {"median": statistics.median(ordered), "p10": at(0.1), "p90": at(0.9), "count": len(ordered)}


def clock(action: Callable[[], Any]) -> float:
    """Seconds until the action's arrays are there."""
    began = time.perf_counter()
    jax.block_until_ready(action())
    return time.perf_counter() - began


def repeat(action: Callable[[], Any], seconds: float, count: int = 0, least: int = 3) -> list[float]:
    """Seconds of `count` calls, or, with count 0, of as many calls as fit into `seconds` (at least `least`)."""
    taken: list[float] = []
    while len(taken) < count if count else (sum(taken) < seconds or len(taken) < least):
        taken.append(clock(action))
    return taken


def peaks(seconds: float, count: int = 0, size: int | None = None) -> dict[str, dict[str, float]]:
    """Operations a second of the fastest of some square matrix products, by type, on the first device.

    Products run at jax's default precision, as the model's do.
    """
    device = jax.devices()[0]
    size = size or PEAK_SIZES.get(device.platform, 2048)
    found = {}
    for dtype in ("float32", "bfloat16"):
        a = jax.device_put(jax.random.normal(jax.random.key(0), (size, size), jnp.dtype(dtype)), device)
        multiply = jax.jit(jnp.matmul)
        jax.block_until_ready(multiply(a, a))
        best = min(repeat(lambda: multiply(a, a), seconds, count))  # noqa: B023 - called at once
        found[dtype] = {"flops_per_second": 2 * size**3 / best, "size": size, "seconds": best}
    return found


def memory(compiled: Any) -> dict[str, int]:
    """Bytes: the device's peak where it tells, the process's peak, and what the compiled step asks for."""
    stats = jax.devices()[0].memory_stats() or {}
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"process_peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if "peak_bytes_in_use" in stats:
        found["device_peak"] = int(stats["peak_bytes_in_use"])
    analysis = compiled.memory_analysis()
    if analysis is not None:
        found["compiled_step"] = sum(getattr(analysis, name, 0) for name in ADDED) - analysis.alias_size_in_bytes
        found["compiled_temporaries"] = analysis.temp_size_in_bytes
    return found
