"""Measures how many rows a core reads, decodes and encodes, for each data task of a config. No network runs.

python -m src.tools.bench_data --config=configs/imagenet256.py --seconds=20
python -m src.tools.bench_data --config=configs/imagenet256.py --task=class_prompt_to_image --json=data.json

Rows come in the shuffled order of a training run, one after the other, in one thread. Seconds are those of the
processor, so that other work on the machine changes them little; a run with `data.workers` processes has so many cores.
"""

import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # no network runs

import numpy as np
from absl import flags
from ml_collections import config_flags

from src.common.runtime import command, config_flag

BATCH = 32
FLAGS = flags.FlagValues()
CONFIG = config_flags.DEFINE_config_file("config", None, "The config file.", flag_values=FLAGS)
TASKS = flags.DEFINE_list("task", None, "The tasks to measure; all by default.", flag_values=FLAGS)
SECONDS = flags.DEFINE_float("seconds", 5.0, "How long each task is measured.", flag_values=FLAGS)
JSON = flags.DEFINE_string("json", None, "File that gets the figures.", flag_values=FLAGS)


def bench(config: Any, names: list[str] | None = None, seconds: float = 5.0) -> dict[str, dict[str, Any]]:
    """Figures by task.

    Raises ValueError for an unknown task.
    """
    from src.build import build_system

    tasks = {name: plan.task for name, plan in build_system(config).tasks.items()}
    unknown = [name for name in names or () if name not in tasks]
    if unknown:
        raise ValueError(f"--task={unknown[0]} is no task of this config; there are {', '.join(tasks)}")
    return {name: measure(tasks[name], seconds) for name in names or tasks}


def measure(task: Any, seconds: float, seed: int = 0) -> dict[str, Any]:
    """Rows that one core makes in a second, in batches of `BATCH`.

    rows_per_second      of the processor's time: fetching, decoding, scaling and encoding of texts, and the batch
    images_per_second    the same for images, drawn or understood; 0 for text alone
    tokens_per_second    valid tokens of texts
    open_seconds         until the first row can be read (files are looked through once, then the index is kept)
    bytes_per_row        of the file's image, on average; 0 where the task has no files
    """
    from src.data.pipeline.reader import read_batch

    began = time.perf_counter()
    rows = task.rows("train")
    opened = time.perf_counter() - began
    rng = np.random.default_rng(seed)
    order = rng.permutation(rows)
    count = bad = images = tokens = 0
    read = lambda numbers: read_batch(task, "train", numbers, rng.random((len(numbers), task.draws)))
    read(order[:BATCH])  # opens what is opened at the first row
    began, cpu = time.perf_counter(), time.process_time()
    while count == 0 or time.perf_counter() - began < seconds:
        batch, flaws = read(order[np.arange(count, count + BATCH) % rows])
        count, bad = count + BATCH, bad + len(flaws)
        for part in batch.tokens.values():
            text = np.issubdtype(part.value.dtype, np.integer)
            tokens += int(part.valid.sum()) if text else 0
            images += 0 if text else int(part.value.any(axis=(-3, -2, -1)).sum())
    cpu, wall = time.process_time() - cpu, time.perf_counter() - began
    return {
        "rows": rows,
        "open_seconds": opened,
        "read": count,
        "bad": bad,
        "rows_per_second": count / cpu,
        "images_per_second": images / cpu,
        "tokens_per_second": tokens / cpu,
        "bytes_per_row": _bytes(task, order[:BATCH]),
        "busy": cpu / wall,
    }


def _bytes(task: Any, index: np.ndarray) -> float:
    """Mean bytes of the image files of some rows."""
    from src.data.example import BadRow
    from src.data.splits import example_of, numbers_of

    sizes = []
    for number in numbers_of(task.source, "train", index):
        try:
            image = example_of(task.source, int(number)).get("image")
            sizes.append(len(image) if isinstance(image, bytes) else image.stat().length)
        except (BadRow, OSError, AttributeError):  # no file
            continue
    return float(np.mean(sizes)) if sizes else 0.0


def table(figures: dict[str, dict[str, Any]]) -> str:
    """The figures as Markdown."""
    lines = ["| task | rows/s a core | images/s a core | text tokens/s a core | image file | opened in |"]
    lines.append("|---|---|---|---|---|---|")
    for name, f in figures.items():
        size = f"{f['bytes_per_row'] / 1e3:,.0f} kB" if f["bytes_per_row"] else ""
        rates = " | ".join(f"{f[key]:,.0f}" for key in ("rows_per_second", "images_per_second", "tokens_per_second"))
        lines.append(f"| {name} | {rates} | {size} | {f['open_seconds']:.2f} s |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    """Exit code; errors that a person can mend are one sentence on standard error."""
    return command.run(lambda: _run(argv))


def _run(argv: list[str]) -> None:
    if config_flag.parse(FLAGS, argv) is None:
        raise ValueError("no config is given: add --config=configs/imagenet256.py (or another file of configs/)")
    from src.tools.datasets import debug_files

    debug_files.fill_for(FLAGS)
    figures = bench(CONFIG.value, TASKS.value, SECONDS.value)
    from src.tools.benchmarks.clock import where

    here = where()
    print(", ".join(f"{name} {value}" for name, value in here.items()) + f", load {os.getloadavg()[0]:.1f}\n")
    print(table(figures))
    if JSON.value:
        with open(JSON.value, "w") as file:
            json.dump({name: group | {"where": here} for name, group in figures.items()}, file, indent=2)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
