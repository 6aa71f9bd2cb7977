"""The parts of the bench that measure this framework: step, data pipeline, sampling of images and of text."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax

from src.build import build_system
from src.common.mesh.distributed import data_shard
from src.common.tree import count_parameters
from src.interfaces import row_of
from src.tools.benchmarks import clock
from src.tools.compile.report import made_in_a_call
from src.train import flops as operations
from src.train.state import TrainState, with_extras
from src.train.system import System
from src.train.trainer import Trainer, make_trainer, open_data

KEPT = 8  # different batches on the device, used in turn
WARM = 3
WARM_BATCHES = 10  # more than any prefetch buffer holds
LEAST_BATCHES = 40


@dataclasses.dataclass
class Bench:
    """A system that has made its first step.

    compiled   the train step; `state` is donated to it, so there is one state at a time
    batches    some different batches, on the host
    """

    system: System
    trainer: Trainer
    compiled: Any
    state: TrainState
    batches: list[Any]
    first: dict[str, Any]
    seconds: float
    steps: int
    say: Callable[[str], None]

    def on_device(self) -> itertools.cycle:
        """The batches as the step takes them, for ever."""
        return itertools.cycle([self.trainer.place(batch, 0) for batch in self.batches])

    def pipeline(self) -> Any:
        """The pipeline of the averaged parameters."""
        return self.system.pipeline.with_params(with_extras(self.state, self.state.ema))

    def step(self, batch: Any) -> Any:
        """One train step; returns its measurements."""
        with jax.set_mesh(self.trainer.mesh):
            self.state, measured = self.compiled(self.state, batch)
        return measured


def start(
    config: Any, started: float, seconds: float, steps: int, say: Callable[[str], None], devices: Any = None
) -> Bench:
    """Builds the system and makes the first step as the train loop does: compiling while the state is made.

    started  `time.monotonic()` of the start; the figures are seconds since then.
    """
    marks = {"imported": time.monotonic() - started}
    say("building the system, compiling the step")
    system = build_system(config)
    trainer = make_trainer(system, devices)
    marks["built"] = time.monotonic() - started
    with ThreadPoolExecutor(1) as pool:
        compiling = pool.submit(trainer.compile)
        state = trainer.init()
    compiled = compiling.result()
    marks["compiled"] = time.monotonic() - started
    data = open_data(trainer)
    batches = [next(data)]
    bench = Bench(system, trainer, compiled, state, batches, {}, seconds, steps, say)
    jax.block_until_ready(bench.step(trainer.place(batches[0], 0)))
    marks["first_step"] = time.monotonic() - started
    batches += [next(data) for _ in range(KEPT - 1)]
    data.close()
    bench.first = {"seconds": marks, "compilation_cache": jax.config.jax_compilation_cache_dir}
    return bench


def tokens_and_images(system: System) -> tuple[int, int]:
    """Tokens (padding included) and images of one step."""
    return sum(p.rows * p.layout.length for p in system.tasks.values()), operations.images(system)


def speed(system: System, median: float, flops: int, peak: float) -> dict[str, float]:
    """What follows from the median seconds of a step: rates, and the share `mfu` of `peak` operations a second."""
    tokens, images = tokens_and_images(system)
    return {
        "tokens": tokens,
        "images": images,
        "tokens_per_second": tokens / median,
        "images_per_second": images / median,
        "model_flops_per_second": flops / median,
        "mfu": flops / median / peak,
    }


def measure_step(bench: Bench, peaks: dict[str, Any]) -> dict[str, Any]:
    """Steps on batches that lie on the device, each waited for; then the loop as it trains, with its data pipeline."""
    batches = bench.on_device()
    bench.say("train step")
    for _ in range(WARM):
        jax.block_until_ready(bench.step(next(batches)))
    taken = clock.spread(clock.repeat(lambda: bench.step(next(batches)), bench.seconds, bench.steps))
    flops = operations.step_flops(bench.system)
    devices = 1 if jax.default_backend() == "cpu" else bench.trainer.mesh.size  # emulated devices share the cores
    peak = peaks[bench.system.config.model.dtype]["flops_per_second"] * devices
    return {
        "seconds": taken,
        **speed(bench.system, taken["median"], flops["total"], peak),
        "model_flops": flops,
        "xla_flops_with_loop_bodies_once": operations.compiled_flops(bench.compiled),
        "peak_flops_per_second": peak,
        "parameters": count_parameters(bench.trainer.abstract.params),
        "loop_seconds": measure_loop(bench),
        "memory_bytes": clock.memory(bench.compiled),
    }


def measure_loop(bench: Bench) -> float:
    """Mean seconds of a step in the train loop: data pipeline, transfer and step overlap, nothing is waited for."""
    bench.say("train loop with its data")
    data = open_data(bench.trainer)
    for _ in range(WARM):
        measured = bench.step(bench.trainer.place(next(data), 0))
    jax.block_until_ready(measured)
    began, count = time.perf_counter(), 0
    while count < bench.steps if bench.steps else (count < WARM or time.perf_counter() - began < bench.seconds):
        measured = bench.step(bench.trainer.place(next(data), 0))
        count += 1
        if count % 10 == 0:
            jax.block_until_ready(measured)  # so that the clock is that of the device
    jax.block_until_ready(measured)
    data.close()
    return (time.perf_counter() - began) / count


def measure_data(bench: Bench, step_seconds: float | None) -> dict[str, Any]:
    """The pipeline alone, after its buffers are used up: rows a second, and how many times what the step consumes."""
    bench.say("data pipeline")
    data = open_data(bench.trainer)
    for _ in range(WARM_BATCHES):
        next(data)
    count = max(bench.steps, LEAST_BATCHES)
    began = time.perf_counter()
    for _ in range(count):
        next(data)
    seconds = (time.perf_counter() - began) / count
    data.close()
    rows = sum(p.rows for p in bench.system.tasks.values()) // data_shard(bench.trainer.mesh)[0][1]
    found = {"seconds_per_batch": seconds, "batches": count, "rows_per_second": rows / seconds}
    return found | ({"times_what_the_step_takes": step_seconds / seconds} if step_seconds else {})


def drawing(system: System) -> tuple[str, list[Any]] | None:
    """The first task that makes images, and the prompts of one full call."""
    return next(((task, prompts(system, task)) for task in system.tasks if unit_of(system, task) == "image"), None)


def writing(system: System) -> tuple[str, list[Any]] | None:
    """The task that makes text (one that reads no image comes first), and what it starts from on one full call."""
    found = [task for task in system.tasks if unit_of(system, task) == "token"]
    if not found:
        return None
    task = min(found, key=lambda name: reads_images(system, name))
    return task, prompts(system, task)


def unit_of(system: System, task: str) -> str:
    """What a task makes: an `image` or `token`s."""
    return made_in_a_call(system, task)[0]


def reads_images(system: System, task: str) -> bool:
    """Whether the rows of a task have tokens of a grid."""
    names = [name for segment in system.tasks[task].layout.segments for name in segment.names]
    return any(system.fields[row_of(name)].spec.grid for name in names)


def prompts(system: System, task: str) -> list[Any]:
    """As many prompts as one call takes, of held-out rows where there are some; some of them again and again."""
    rows, data = system.pipeline.batch_size, system.tasks[task].task
    try:
        found = data.questions(rows, "test")
    except ValueError:  # the split is empty
        found = data.questions(rows, "train")
    return [found[i % len(found)] for i in range(rows)]


def measure_sample(bench: Bench) -> dict[str, Any]:
    """Images a second of full calls of the sampler, without guidance and with it (two networks' worth of rows)."""
    found = drawing(bench.system)
    if found is None:
        return {"skipped": "no task makes images"}
    task, given = found
    row = row_of(bench.system.tasks[task].task.fill[0])
    pipeline = bench.pipeline()
    settings = {"task": task, "rows": len(given), "steps": getattr(pipeline.decoders[row], "steps", None),
                "sampler": type(bench.system.fields[row].step).__name__}  # fmt: skip
    scale = guided_scale(pipeline)
    for name, value in (("plain", 1.0), ("guided", scale)):
        bench.say(f"drawing, {name}")
        draw = lambda value=value: pipeline.values(task, given, 0, scale=value)
        compile_seconds = clock.clock(draw)
        taken = clock.spread(clock.repeat(draw, bench.seconds, bench.steps))
        settings[name] = {"seconds": taken, "images_per_second": len(given) / taken["median"],
                          "first_call_seconds": compile_seconds}  # fmt: skip
    return settings


def guided_scale(pipeline: Any) -> float:
    """The guidance scale of a config, or 2 where that is none."""
    return 2.0 if pipeline.guidance.scale == 1 else pipeline.guidance.scale


def measure_decode(bench: Bench) -> dict[str, Any]:
    """Tokens a second of full calls with the key-value cache; every row makes all tokens, stopped or not."""
    found = writing(bench.system)
    if found is None:
        return {"skipped": "no task makes text"}
    task, given = found
    bench.say("writing")
    pipeline = bench.pipeline()
    write = lambda: pipeline(task, given, 0)
    compile_seconds = clock.clock(write)
    taken = clock.spread(clock.repeat(write, bench.seconds, bench.steps))
    _, tokens = made_in_a_call(bench.system, task)
    return {"task": task, "rows": len(given), "tokens": tokens, "seconds": taken,
            "tokens_per_second": tokens / taken["median"], "first_call_seconds": compile_seconds}  # fmt: skip
