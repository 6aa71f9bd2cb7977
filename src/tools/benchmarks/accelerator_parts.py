"""What `bench --preset=accelerator` measures, each part in a process of its own: `python -m … PART`.

A part writes a line of JSON to standard output for each of its figures as soon as it has them, so that what a process
had found stays known when it is ended. Nothing is read: parameters and rows are random, of the published shapes. On a
CPU everything is tiny.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from src.build import build_system
from src.common.mesh.peaks import bf16_peak
from src.common.runtime import errors
from src.common.runtime.compilation_cache import use_program_cache
from src.common.tree import count_parameters
from src.interfaces import row_of
from src.tools.benchmarks import clock
from src.tools.benchmarks.encoders import measure_encoder
from src.tools.benchmarks.parts import guided_scale, unit_of
from src.tools.compile.report import OnlyShapes, made_in_a_call
from src.train.flops import step_flops
from src.train.trainer import Trainer, make_trainer

Found = Iterator[tuple[str, Callable[[], dict[str, Any]]]]  # name and action of each figure, made one after the other
TRIES = ((32, "none"), (32, "dots"), (128, "dots"), (128, "names"), (256, "full"))  # rows of a step, remat
TINY_TRIES = ((4, "dots"), (8, "full"))
STATE = 20  # bytes a parameter: float32 weights, average, two moments, gradient
ROOM = 0.6  # of a chip's memory for them
STEPS = 25  # of drawing
WARM = 2


@dataclasses.dataclass(frozen=True)
class PartSizes:
    """How large the parts are. `tiny`: what a CPU does in seconds; `calls` of each action, or, if 0, `seconds`."""

    tiny: bool
    seconds: float = 3.0
    calls: int = 0

    @property
    def variant(self) -> str | None:
        """Of the configs."""
        return "debug" if self.tiny else None


def about() -> dict[str, Any]:
    """Machine and versions, the published peak in bf16, and the bytes of memory that JAX may use."""
    device = jax.devices()[0]
    limit = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
    return {
        "where": clock.where(),
        "platform": device.platform,
        "chip": device.device_kind,
        "peak": bf16_peak(device.device_kind),
        "memory": limit,
    }


def random_batch(trainer: Trainer, seed: int = 0) -> dict[str, Any]:
    """Rows as the train step takes them: the tasks' own inventions, and normal numbers for what is encoded."""
    system = trainer.system
    rows = {name: plan.task.fake(plan.rows, seed) for name, plan in system.tasks.items()}
    rng, out = np.random.default_rng(seed), {}
    for task, abstract in system.encoders.spec(system.raw_spec()).items():
        tokens = dict(rows[task].tokens)
        for name in tokens:
            if row_of(name) in system.encoders.nets:
                shape = abstract.tokens[name].value.shape
                tokens[name] = tokens[name].replace(value=rng.standard_normal(shape, dtype=np.float32))
        out[task] = rows[task].replace(tokens=tokens)
    return jax.device_put(out, jax.tree.map(lambda leaf: leaf.sharding, trainer.batch()))


def paper_config(sizes: PartSizes, memory: float | None = None) -> tuple[Any, str]:
    """The paper's config for one device in bf16, and what was changed so that its state fits into the memory."""
    from configs import imagenet256

    config = imagenet256.get_config(sizes.variant)
    config.mesh.update({"data": 1, "fsdp": 1})
    config.model.dtype, config.init_from.path = "bfloat16", ""
    depth = config.model.trunk.depth
    while memory and depth > 1 and STATE * _parameters(config) > ROOM * memory:
        config.model.trunk.depth -= 1
    cut = config.model.trunk.depth
    return config, "" if cut == depth else f"{cut} of {depth} layers, so that the state fits into {memory / 1e9:.0f} GB"


def _parameters(config: Any) -> int:
    system = build_system(config)
    return count_parameters(jax.eval_shape(system.init, jax.random.key(0)))


def measure_paper_step(sizes: PartSizes) -> Found:
    """The paper's step at several numbers of rows and ways of recomputation, one after the other in one state."""
    known = about()
    config, changed = paper_config(sizes, known["memory"])
    peaks = clock.peaks(min(sizes.seconds, 1.0), sizes.calls, 256 if sizes.tiny else None)["bfloat16"]
    yield "matrix products", lambda: {"flops_per_second": peaks["flops_per_second"], "size": peaks["size"]}
    held: dict[str, Any] = {}

    def one(rows: int, remat: str) -> dict[str, Any]:
        config.batch, config.model.trunk.remat = rows, remat
        system = build_system(config)
        trainer = make_trainer(system, jax.devices()[:1])
        compiled = trainer.compile()
        state = held.pop("state", None)
        if state is None or any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
            state = trainer.init()
        batch = random_batch(trainer)

        def step() -> Any:
            nonlocal state
            with jax.set_mesh(trainer.mesh):
                state, measured = compiled(state, batch)
            return measured

        for _ in range(WARM):
            jax.block_until_ready(step())
        taken = clock.spread(clock.repeat(step, sizes.seconds, sizes.calls))
        held["state"], needed = state, step_flops(system)["total"]
        return {
            "rows": rows,
            "seconds": taken,
            **rates(system, needed, taken["median"], known["peak"], peaks["flops_per_second"]),
            **{f"memory_{name}": value for name, value in clock.memory(compiled).items() if name != "process_peak"},
            "parameters": count_parameters(trainer.abstract.params),
            **({"changed": changed} if changed else {}),
        }

    def attempt(rows: int, remat: str) -> dict[str, Any]:
        trunk = config.model.trunk
        try:
            return one(rows, remat) | {"attention": trunk.attention}
        except Exception as error:
            if not out_of_memory(error):
                trunk.attention = "dense"  # so that a kernel that fails does not take the other figures with it
            raise

    for rows, remat in TINY_TRIES if sizes.tiny else TRIES:
        yield f"{rows} rows, remat {remat}", lambda rows=rows, remat=remat: attempt(rows, remat)


def rates(system: Any, needed: float, median: float, peak: float | None, measured: float) -> dict[str, float]:
    """What follows from the seconds of a step: `mfu` of the published peak, where one is known, and of the measured."""
    tokens = sum(plan.rows * plan.layout.length for plan in system.tasks.values())
    found = {"tokens_per_second": tokens / median, "model_flops_per_second": needed / median}
    return found | ({"mfu": needed / median / peak} if peak else {}) | {"mfu_of_measured": needed / median / measured}


class _NoFiles(OnlyShapes):
    """Latents stay latents: there is no autoencoder."""

    def decode(self, row: str, values: np.ndarray, mesh: Any) -> np.ndarray:
        """The values themselves."""
        return values


def _sampler(sizes: PartSizes, unit: str, rows: int) -> tuple[Any, Any, str, list[Any]]:
    """System and pipeline of text to image with random parameters, the task that makes such units, and prompts."""
    from configs import journeydb_ultrachat

    config = journeydb_ultrachat.get_config(sizes.variant)
    config.mesh.update({"data": 1, "fsdp": 1})
    config.model.dtype, config.init_from.path = "bfloat16", ""
    config.sample.batch_size = rows
    config.decode.image.steps = 2 if sizes.tiny else STEPS
    config.decode.text.max_new_tokens = 4 if sizes.tiny else 64
    system = build_system(config)
    trainer = make_trainer(system, jax.devices()[:1])
    params = trainer.init_params()
    pipeline = dataclasses.replace(system.pipeline, frozen=_NoFiles(system.encoders.nets), params=params)
    task = next(name for name in system.tasks if unit_of(system, name) == unit)
    return system, pipeline, task, [system.tasks[task].task.invented_question()] * rows


def measure_drawing(sizes: PartSizes) -> Found:
    """Latents of images, guided and not, by full calls of the sampler; the network runs on two rows an image guided."""
    rows = 4 if sizes.tiny else 32
    _, pipeline, task, given = _sampler(sizes, "image", rows)

    def one(scale: float) -> dict[str, Any]:
        draw = lambda: pipeline.values(task, given, 0, scale=scale)
        first = clock.clock(draw)
        taken = clock.spread(clock.repeat(draw, sizes.seconds, sizes.calls, least=2))
        steps = pipeline.decoders["image"].steps
        return {"rows": rows, "steps": steps, "seconds": taken, "images_per_second": rows / taken["median"],
                "first_call_seconds": first}  # fmt: skip

    yield "guided", lambda: one(guided_scale(pipeline))
    if not sizes.tiny:
        yield "plain", lambda: one(1.0)


def measure_decoding(sizes: PartSizes) -> Found:
    """Tokens of texts with the key-value cache; every row makes all of them."""
    rows = 4 if sizes.tiny else 64
    system, pipeline, task, given = _sampler(sizes, "token", rows)

    def one() -> dict[str, Any]:
        write = lambda: pipeline.values(task, given, 0)
        first = clock.clock(write)
        taken = clock.spread(clock.repeat(write, sizes.seconds, sizes.calls, least=2))
        tokens = made_in_a_call(system, task)[1]
        return {"rows": rows, "tokens": tokens, "seconds": taken, "tokens_per_second": tokens / taken["median"],
                "first_call_seconds": first}  # fmt: skip

    yield "greedy", one


def measure_frozen_encoders(sizes: PartSizes) -> Found:
    """The frozen encoders of text to image and of images that are read, in float32 and bf16."""
    from configs import llava_journeydb

    config = llava_journeydb.get_config("pixels,debug" if sizes.tiny else "pixels")
    nets = build_system(config).encoders.sketch()[0].nets
    for row in nets:
        for dtype in ("float32", "bfloat16"):
            frozen = config.fields[row].codec.frozen
            with config.unlocked():
                frozen.dtype = dtype
            net = build_system(config).encoders.sketch()[0].nets[row]
            rows = 2 if sizes.tiny else min(net.rows, 16)
            size = 256 if sizes.tiny else None
            measure = lambda net=net, n=rows, m=size: measure_encoder(
                net, (n, *net.takes), sizes.seconds, sizes.calls, m
            )
            yield f"{row} in {dtype}", measure


def measures() -> dict[str, Callable[[PartSizes], Found]]:
    """The parts by name."""
    from src.tools.benchmarks.backends import measure_backends
    from src.tools.benchmarks.torch_step import measure_torch

    return {
        "attention": measure_backends,
        "step": measure_paper_step,
        "peer": measure_torch,
        "drawing": measure_drawing,
        "decoding": measure_decoding,
        "encoders": measure_frozen_encoders,
    }


def run(part: str, sizes: PartSizes, emit: Callable[[dict[str, Any]], None]) -> None:
    """Emits each figure of a part by name; one that fails is `failed`, with the reason, and the next one follows."""
    found = measures()[part](sizes)
    while True:
        name = "all"
        try:
            name, action = next(found)
            emit({"begins": name})
            figures = action()
        except StopIteration:
            return
        except Exception as error:  # whatever a kernel or compiler raises is a line of the result
            figures = {"failed": reason(error)}
        emit({"name": name, "figures": figures})
        gc.collect()


def reason(error: Exception) -> str:
    """Why a figure could not be had, in one line."""
    return f"out of memory ({errors.brief(error)[:160]})" if out_of_memory(error) else errors.brief(error)


def out_of_memory(error: Exception) -> bool:
    """Whether the device's memory did not suffice, as JAX and PyTorch say it."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


def main(argv: list[str]) -> int:
    """`PART [SECONDS]`: writes lines of JSON, first what machine it is."""
    use_program_cache()
    known = about()
    tiny = known["platform"] == "cpu"
    emit = lambda line: print(json.dumps(line), flush=True)
    emit({"about": known | {"tiny": tiny}})
    run(argv[1], PartSizes(tiny, float(argv[2]), 2 if tiny else 0), emit)
    emit({"done": argv[1]})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
