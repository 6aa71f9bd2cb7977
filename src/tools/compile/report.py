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
from src.interfaces import row_of
from src.sampling.frozen_links import FrozenLinks
from src.tools.compile.chips import GIB
from src.tools.compile.cost import hbm_bytes, matmul_flops
from src.tools.compile.hlo import collectives
from src.tools.compile.programs import seconds
from src.tools.compile.roofline import ASSUMPTIONS, roofline
from src.tools.compile.topology import Topology
from src.train.average import AVERAGES
from src.train.flops import acting_counts, images, step_flops
from src.train.saved_step import SavedStep, own_packages, step_facts
from src.train.state import with_extras
from src.train.system import System
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
    compiled: Any = None


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
    return Program(done.as_text(), done.memory_analysis(), 0.0, 0.0, time.monotonic() - began, done)


def train_report(
    config: Any, topology: Topology, hbm: float, encoders: dict[Any, Program] | None = None, save: str = ""
) -> dict[str, Any]:
    """Everything about the train step of a config on a topology (`src/tools/aot.py` prints it).

    The program of the frozen encoders that runs before the step is the part `encoding`, with the same entries.
    `encoders` keeps these programs for calls with other meshes or batches of the same config. The step is written into
    the workdir `save`, where one is given, for a run on such devices (`train/saved_step.py`).
    Raises ValueError for a config that means nothing on so many devices, OSError where nothing can be written.
    """
    system = build_system(config)
    sketched, assumed = system.encoders.sketch()
    trainer = make_trainer(dataclasses.replace(system, encoders=sketched), devices=topology.devices)
    program, encoder = compile_program(trainer.lower()), encoding_program(trainer, encoders)
    saved = _save(trainer, program, save) if save and program.text else {}
    state = trainer.abstract
    averages = (state.ema, state.extra.get(AVERAGES, {}))
    known = {"parameters": state.params, "ema": averages, "optimizer": state.opt_state}
    known = {name: local_bytes(tree) for name, tree in known.items()}
    batch = local_bytes(trainer.batch())
    held = encoder_memory(trainer, encoder, batch) if encoder else {}
    report = head(topology, trainer.mesh, count_parameters(state.params))
    report |= {"memory": memory(known | {"batch": batch}, program, topology, hbm, "batch", held)}
    report |= saved | {"compile_seconds": round(program.seconds, 1)}
    needed = step_flops(system)["total"]
    report["flops"] = {"model_per_step": needed}
    if encoder:
        own = {name: held[name] for name in ("frozen encoders", "next batch, raw")}
        rest = known | {"batch": batch, "program of the step": code_bytes(program)}
        part = {"assumed": list(assumed), "memory": memory(own, encoder, topology, hbm, None, rest)}
        report["encoding"] = part | {"compile_seconds": round(encoder.seconds, 1)}
    if not program.text:
        return report
    cost(report, program, topology, trainer.mesh, needed / len(topology.devices))
    if encoder and encoder.text:
        cost(report["encoding"], encoder, topology, trainer.mesh, 0)
    return report | predicted(report, system, topology, needed, config.steps)


def _save(trainer: Trainer, program: Program, workdir: str) -> dict[str, Any]:
    """Writes the step into a workdir. Raises ValueError or OSError, in one sentence."""
    if own := own_packages(trainer.system.config):
        raise ValueError(f"--save does not work with parts of other packages ({', '.join(own)}): leave it out")
    step = SavedStep(trainer, workdir)
    try:
        size = step.write(program.compiled, step_facts(trainer))
    except Exception as error:  # a store's client has its own kinds
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise OSError(f"the step cannot be written to {step.path} ({reason}): correct --save, or omit it") from error
    return {"saved": {"path": str(step.path), "bytes": size}}


def predicted(report: Mapping[str, Any], system: Any, topology: Topology, needed: float, steps: int) -> dict[str, Any]:
    """What follows from the seconds of all programs of a step; `needed` are the model's FLOPs."""
    counts, peak, found = acting_counts(system), topology.chip.flops * topology.chips, {}
    for case in ("best", "worst"):
        if (time_of_step := seconds(report, case)) is not None:
            found[case] = {
                "mfu": needed / peak / time_of_step,
                "tokens_per_second": counts["tokens"] / time_of_step,
                "images_per_second": images(system) / time_of_step,
                "days": steps * time_of_step / DAY,
            }
    return {"predicted": found, "steps": steps} if found else {}


def encoding_program(trainer: Trainer, encoders: dict[Any, Program] | None = None) -> Program | None:
    """The compiled program of the frozen encoders (`Trainer.place`), or None where there are none."""
    lowered = trainer.lower_encode()
    if lowered is None:
        return None
    ways = math.prod(trainer.mesh.shape.get(axis, 1) for axis in ("data", "fsdp"))
    key = (ways, trainer.mesh.size, tuple(map(str, jax.tree.leaves(trainer.system.raw_spec()))))
    encoders = {} if encoders is None else encoders
    if key not in encoders:  # its rows do not see each other: which of the axes splits them does not matter
        encoders[key] = compile_program(lowered)
    return encoders[key]


def encoder_memory(trainer: Trainer, encoder: Program, batch: int) -> dict[str, int]:
    """Bytes of a device, while a step runs, of what the frozen encoders bring.

    The host goes ahead by a step: the next batch is there as the data deliver it, and its place when it is encoded.
    """
    return {
        "frozen encoders": local_bytes(trainer.encoder_shapes()),
        "their program": code_bytes(encoder),
        "next batch, raw": local_bytes(trainer.raw_batch()),
        "next batch": batch,
    }


def code_bytes(program: Program) -> int:
    """Bytes of a program itself; 0 for one that was too large to compile."""
    return program.stats.generated_code_size_in_bytes if program.stats else 0


def sample_reports(config: Any, topology: Topology, hbm: float, only: str | None = None) -> dict[str, dict[str, Any]]:
    """By task, everything about one call of its sampler: `sample.batch_size` rows.

    Raises ValueError when there is no task of the name `only`.
    """
    system = build_system(config)
    trainer = make_trainer(system, devices=topology.devices)
    params = trainer.abstract.params
    frozen = OnlyShapes(system.encoders.nets)
    pipeline = dataclasses.replace(system.pipeline, frozen=frozen, params=with_extras(trainer.abstract))
    reports = {}
    for task in [only] if only else system.tasks:
        unit, count = made_in_a_call(system, task)
        question = system.tasks[task].task.invented_question()
        program = compile_program(pipeline.lower(task, [question], guided=unit == "image"))
        report = head(topology, trainer.mesh, count_parameters(params))
        known = {"parameters": local_bytes(params)}
        report["memory"] = memory(known, program, topology, hbm, "parameters")
        report["compile_seconds"] = round(program.seconds, 1)
        if program.text:
            cost(report, program, topology, trainer.mesh, 0)
            seconds = report["roofline"]
            report["predicted"] = {
                case: {f"seconds_per_{unit}": seconds[case] / count, f"{unit}s_per_second": count / seconds[case]}
                for case in ("best", "worst")
            }
        reports[task] = report
    return reports


class OnlyShapes(FrozenLinks):
    """Frozen networks that nobody runs: what they give has the right shape."""

    def encode(self, row: str, values: np.ndarray, mesh: Any) -> np.ndarray:
        """Zeros."""
        return np.zeros((len(values), *self.nets[row].shape), np.float32) if row in self.nets else values


def made_in_a_call(system: System, task: str) -> tuple[str, int]:
    """The unit of what a task makes, an `image` (of fields with a grid) or a `token`, and how many of them in one call.

    Raises ValueError when there is no task of this name.
    """
    if task not in system.tasks:
        raise ValueError(f"there is no task {task!r}; this system has {', '.join(system.tasks)}")
    row, rows = row_of(system.tasks[task].task.fill[0]), system.pipeline.batch_size
    if system.fields[row].spec.grid:
        return "image", rows
    longest = getattr(system.pipeline.decoders[row], "max_new_tokens", None)
    return "token", rows * (longest or system.tasks[task].layout.segment(system.tasks[task].task.fill[0]).length)


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
