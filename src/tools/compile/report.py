"""Compiles a train step or a sampler for devices that are not there, and reads off what it will need."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from src.build import build_system
from src.common.tree import count_parameters
from src.sampling import pipeline
from src.tools.compile.chips import GIB
from src.tools.compile.cost import hbm_bytes, matmul_flops
from src.tools.compile.flops import acting_counts, step_flops
from src.tools.compile.hlo import collectives
from src.tools.compile.programs import seconds
from src.tools.compile.roofline import ASSUMPTIONS, roofline
from src.tools.compile.topology import Topology
from src.train.trainer import Trainer, make_trainer

DAY = 86_400
NUMBER = r"([\d.]+)([KMGT])"
TOO_LARGE = (  # two ways in which the TPU compiler says (all of it, of what there is)
    re.compile(rf"\({NUMBER}\) exceeds available HBM \({NUMBER}\)"),
    re.compile(rf"Used {NUMBER} of {NUMBER} hbm"),
)
UNIT = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, or what the compiler said of its memory."""

    text: str
    stats: Any
    used: float  # bytes of a device, when it did not fit
    limit: float
    seconds: float


def compile_program(lowered: Any) -> Program:
    """Compiles; a program that is too large is an answer, not an error."""
    began = time.monotonic()
    try:
        done = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        match = next((m for pattern in TOO_LARGE if (m := pattern.search(str(error)))), None)
        if "RESOURCE_EXHAUSTED" not in str(error) or match is None:
            raise
        used, limit = (float(match[i]) * UNIT[match[i + 1]] for i in (1, 3))
        return Program("", None, used, limit, time.monotonic() - began)
    return Program(done.as_text(), done.memory_analysis(), 0.0, 0.0, time.monotonic() - began)


def train_report(
    config: Any, topology: Topology, hbm: float, encoders: dict[Any, Program] | None = None
) -> dict[str, Any]:
    """Everything about the train step of a config on a topology (`src/tools/aot.py` prints it).

    The program of the frozen networks that runs before the step is the part `encoding`, with the same entries.
    `encoders` keeps these programs for calls with other meshes or batches of the same config.
    Raises ValueError for a config that means nothing on so many devices.
    """
    system = build_system(config)
    frozen, assumed = system.frozen.sketch()
    trainer = make_trainer(dataclasses.replace(system, frozen=frozen), devices=topology.devices)
    program, encoder = compile_program(trainer.lower()), encoding_program(trainer, encoders)
    state = trainer.abstract
    known = {"parameters": state.params, "ema": state.ema, "optimizer": state.opt_state}
    known = {name: local_bytes(tree) for name, tree in known.items()}
    batch = local_bytes(trainer.batch())
    held = frozen_memory(trainer, encoder, batch) if encoder else {}
    report = head(topology, trainer.mesh, count_parameters(state.params))
    report |= {"memory": memory(known | {"batch": batch}, program, topology, hbm, "batch", held)}
    report["compile_seconds"] = round(program.seconds, 1)
    needed = step_flops(system)["total"]
    report["flops"] = {"model_per_step": needed}
    if encoder:
        own = {name: held[name] for name in ("frozen networks", "next batch, delivered")}
        rest = known | {"batch": batch, "program of the step": code_bytes(program)}
        part = {"assumed": list(assumed), "memory": memory(own, encoder, topology, hbm, None, rest)}
        report["encoding"] = part | {"compile_seconds": round(encoder.seconds, 1)}
    if not program.text:
        return report
    cost(report, program, topology, trainer.mesh, needed / len(topology.devices))
    if encoder and encoder.text:
        cost(report["encoding"], encoder, topology, trainer.mesh, 0)
    return report | predicted(report, system, topology, needed, config.steps)


def predicted(report: Mapping[str, Any], system: Any, topology: Topology, needed: float, steps: int) -> dict[str, Any]:
    """What follows from the seconds of all programs of a step; `needed` are the model's FLOPs."""
    counts, peak, found = acting_counts(system), topology.chip.flops * topology.chips, {}
    for case in ("best", "worst"):
        if (time_of_step := seconds(report, case)) is not None:
            found[case] = {
                "mfu": needed / peak / time_of_step,
                "tokens_per_second": counts["tokens"] / time_of_step,
                "images_per_second": counts["vectors"] / time_of_step,
                "days": steps * time_of_step / DAY,
            }
    return {"predicted": found, "steps": steps} if found else {}


def encoding_program(trainer: Trainer, encoders: dict[Any, Program] | None = None) -> Program | None:
    """The compiled program of the frozen networks (`Trainer.place`), or None where there are none."""
    lowered = trainer.lower_encode()
    if lowered is None:
        return None
    ways = math.prod(trainer.mesh.shape.get(axis, 1) for axis in ("data", "fsdp"))
    key = (ways, trainer.mesh.size, tuple(map(str, jax.tree.leaves(trainer.system.delivered()))))
    encoders = {} if encoders is None else encoders
    if key not in encoders:  # its rows do not see each other: which of the axes splits them does not matter
        encoders[key] = compile_program(lowered)
    return encoders[key]


def frozen_memory(trainer: Trainer, encoder: Program, batch: int) -> dict[str, int]:
    """Bytes of a device, while a step runs, of what the frozen networks bring.

    The host goes ahead by a step: the next batch is there as it was delivered, and its place when it is encoded.
    """
    return {
        "frozen networks": local_bytes(trainer.frozen_shapes()),
        "their program": code_bytes(encoder),
        "next batch, delivered": local_bytes(trainer.delivered()),
        "next batch": batch,
    }


def code_bytes(program: Program) -> int:
    """Bytes of a program itself; 0 for one that was too large to compile."""
    return program.stats.generated_code_size_in_bytes if program.stats else 0


def sample_reports(config: Any, topology: Topology, hbm: float, only: str | None = None) -> dict[str, dict[str, Any]]:
    """By task, everything about one call of its sampler: `sample.rows` images or texts.

    Raises ValueError when there is no task of the name `only`.
    """
    system = build_system(config)
    trainer = make_trainer(system, devices=topology.devices)
    params = trainer.abstract.params
    reports = {}
    for task in [only] if only else system.predictor.tasks:
        lowered, kind, count = lower_sampler(system.predictor, task, params, trainer.mesh)
        program = compile_program(lowered)
        report = head(topology, trainer.mesh, count_parameters(params))
        known = {"parameters": local_bytes(params)}
        report["memory"] = memory(known, program, topology, hbm, "parameters")
        report["compile_seconds"] = round(program.seconds, 1)
        if program.text:
            cost(report, program, topology, trainer.mesh, 0)
            seconds = report["roofline"]
            unit = "token" if kind == "text" else "image"
            report["predicted"] = {
                case: {f"seconds_per_{unit}": seconds[case] / count, f"{unit}s_per_second": count / seconds[case]}
                for case in ("best", "worst")
            }
        reports[task] = report
    return reports


def lower_sampler(predict: pipeline.Predictor, task: str, params: Any, mesh: Any) -> tuple[Any, str, int]:
    """The sampler of a task on abstract parameters, what it makes, and how many of them in one call."""
    data, layout, name = predict.task(task)
    kind, caught = layout.segment(name).kind, {}

    class Caught(Exception):
        """Stops the sampler before it runs."""

    class Recorder(pipeline.Predictor):
        """Notes what the sampler would run on."""

        def _run(self, layout, name, given, null, seed):
            caught.update(static=self._static(layout, name), arrays=(given, null), length=layout.segment(name).length)
            raise Caught

    recorder = Recorder(**{f.name: getattr(predict, f.name) for f in dataclasses.fields(predict)})
    rows = predict.rows
    try:
        if kind == "image":
            labels = None if data.classes is None else [0] * rows
            recorder.draw(task, words=[""] * rows if labels is None else None, labels=labels)
        elif layout.named("image"):
            recorder.write(task, images=np.zeros((rows, *data.image_shape), np.float32))
        else:
            recorder.write(task, words=[""] * rows)
    except Caught:
        pass
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), caught["arrays"])
    key = jax.eval_shape(lambda: jax.random.key(0))
    with jax.set_mesh(mesh):
        lowered = pipeline._generate.lower(caught["static"], params, *shapes, key)
    return lowered, kind, rows * (predict.longest if kind == "text" else 1)


def local_bytes(tree: Any) -> int:
    """Bytes of abstract arrays on one device."""
    return sum(math.prod(s.sharding.shard_shape(s.shape)) * s.dtype.itemsize for s in jax.tree.leaves(tree))


def head(topology: Topology, mesh: Any, parameters: int) -> dict[str, Any]:
    """What every report starts with."""
    chip = dataclasses.asdict(topology.chip) | {"options": dict(topology.chip.options)}
    return {
        "topology": topology.name,
        "slices": topology.slices,
        "chips": topology.chips,
        "devices": len(topology.devices),
        "chip": chip,
        "mesh": dict(mesh.shape),
        "parameters": parameters,
    }


def memory(
    known: Mapping[str, int],
    program: Program,
    topology: Topology,
    hbm: float,
    spare: str | None,
    held: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Bytes of one device by kind, their total, what the device has, and whether it fits.

    known   the program's arguments; `spare` is the one that has parts which are not passed and then not there (None:
            they are there all the same)
    held    what is there besides while it runs
    """
    out: dict[str, Any] = {**known, **(held or {})}
    have = hbm * topology.share
    if program.stats is None:
        total, have = program.used + sum((held or {}).values()), min(have, program.limit)
        out["temporaries"] = round(program.used - sum(known.values()))
    else:
        s = program.stats
        rest = s.argument_size_in_bytes - sum(known.values())
        if spare:
            out[spare] += min(0, rest)
        out["padding and other arguments"] = max(0, rest)
        out["outputs"] = s.output_size_in_bytes - s.alias_size_in_bytes
        out["program"] = s.generated_code_size_in_bytes
        out["temporaries"] = s.temp_size_in_bytes
        total = sum(out.values())
    return out | {"total": round(total), "hbm": round(have), "fits": total <= have,
                  "shortfall": max(0, round(total - have))}  # fmt: skip


def cost(report: dict[str, Any], program: Program, topology: Topology, mesh: Any, least: float) -> None:
    """Adds FLOPs, traffic, collectives and roofline of one device's program; `least` is what the model needs."""
    found, flops, traffic = (
        collectives(program.text, dict(mesh.shape)),
        matmul_flops(program.text),
        hbm_bytes(program.text),
    )
    passes = matmul_flops(program.text, passes=True)
    report.setdefault("flops", {})["program_per_device"] = flops
    report["flops"]["passes_per_device"] = passes
    report["hbm_bytes"] = traffic
    sums: dict = defaultdict(lambda: [0, 0])
    for c in found:
        sums[c.kind, c.axes][0] += c.bytes * c.times
        sums[c.kind, c.axes][1] += c.times
    largest = sorted(sums.items(), key=lambda item: -item[1][0])
    report["collectives"] = [
        {"kind": kind, "axes": list(axes), "bytes": size, "executions": times}
        for (kind, axes), (size, times) in largest
    ]
    times = roofline(max(passes, least), traffic, found, topology, mesh)
    report["roofline"] = dataclasses.asdict(times) | {"best": times.best, "worst": times.worst}
    report["assumptions"] = list(ASSUMPTIONS)
