"""Draws many images from a trained run, to be scored.

python -m src.tools.draw --config=configs/imagenet256.py --workdir=runs/imagenet256 --count=50000 --out=drawn
python -m src.tools.draw --config=configs/imagenet256.py --workdir=… --out=drawn-g2 --config.guidance.scale=2
python -m src.tools.draw --config=configs/journeydb_ultrachat.py --workdir=… --prompts=prompts.txt --out=drawn
python -m src.tools.draw --config=… --workdir=… --benchmark=geneval --prompts=evaluation_metadata.jsonl --out=drawn

All devices draw, each some rows. The images of a class are as many as those of any other (--classes=random: as chance
has it); of --prompts, each line in turn. What is done is kept in shards, and the same command goes on where it was
stopped, with the images that it would have made. `src.tools.scores` reads the folder; --npz joins it into one file in
the form of ADM's samples. With --benchmark each prompt of its file has so many images as its judge wants, and they lie
in a folder of the benchmark's name below --out, as its judge reads them.
"""

from __future__ import annotations

import hashlib
import sys
import time
from typing import Any

import numpy as np
from absl import flags

from src.common.runtime import command, config_flag
from src.tools.datasets.sources import flags_of_config


def define() -> flags.FlagValues:
    """The flags."""
    values = flags_of_config("The config of the run.")
    common = {"flag_values": values}
    flags.DEFINE_string("workdir", None, "The run.", **common)
    flags.DEFINE_string("step", "latest", "Its checkpoint: a step, latest or best.", **common)
    flags.DEFINE_string("task", None, "The task that draws, where there are several.", **common)
    flags.DEFINE_integer("count", 50_000, "Images.", 1, **common)
    flags.DEFINE_enum("classes", "balanced", ["balanced", "random"], "Which classes are drawn.", **common)
    flags.DEFINE_string("prompts", None, "Instead of classes: a text file with a prompt in each line.", **common)
    known = ["geneval", "dpg", "wise", "t2i_compbench"]
    flags.DEFINE_enum("benchmark", None, known, "--prompts is that of a benchmark, whose judge wants PNGs.", **common)
    flags.DEFINE_integer("each", None, "--benchmark: images of a prompt, instead of what its judge wants.", 1, **common)
    flags.DEFINE_integer("rows", 1000, "Images of a shard: so many are lost when the job is stopped.", 1, **common)
    flags.DEFINE_integer("cpu_devices", None, "Devices on a CPU; unless given, one a core.", **common)
    flags.DEFINE_integer("seed", 0, "Of the noise and of --classes=random.", 0, **common)
    flags.DEFINE_string("out", None, "The folder of the images.", **common)
    flags.DEFINE_string("npz", None, "A file that gets all images in the end, for ADM's evaluator.", **common)
    return values


def main(argv: list[str]) -> int:
    """The exit code."""
    values = define()
    goes_on = "interrupted; the same command goes on from there"
    return command.run(lambda: run(values, config_flag.parse(values, argv)), values, goes_on)


def run(values: flags.FlagValues, config: Any) -> None:
    """Draws what the flags say. Raises ValueError, before anything is read, for flags that do not fit."""
    for name in ("config", "workdir", "out"):
        if not values[name].value:
            raise ValueError(f"give --{name}: --config=…, the --workdir of its run, and the folder --out of the images")
    from src.build import build_system, rows_of
    from src.common.mesh import distributed
    from src.common.runtime import cpu_devices

    if told := cpu_devices.start(config, rows_of(config), values.cpu_devices):
        _say(told)
    distributed.start()
    from etils import epath

    from src.common.runtime.compilation_cache import use_program_cache
    from src.evals.scores.benchmarks import write_benchmark
    from src.evals.scores.drawn_images import DrawnImages, draw, join, read_drawn
    from src.tools.datasets import debug_files

    use_program_cache()
    debug_files.fill_for(values)
    system = build_system(config)
    benchmark = _benchmark(values)
    name, examples, labels = wanted(system, values, benchmark)
    state, params, about = _restored(values, system)
    about |= {"task": name, "seed": values.seed, **_chosen(values, labels, benchmark)}
    count, rows = values.count, values.rows
    if benchmark is not None:
        count, rows = len(benchmark[1]) * benchmark[2], -(-rows // benchmark[2]) * benchmark[2]
    images = DrawnImages(epath.Path(values.out), about, count, rows)
    pipeline, began, before = system.pipeline.with_params(params), time.monotonic(), len(images.missing())
    made = system.pipeline.tasks[name].fill[0]
    left = before

    def make(rows: range, seed: int) -> np.ndarray:
        return np.stack([row[made] for row in pipeline(name, [examples(number) for number in rows], seed)])

    def told(done: int) -> None:
        nonlocal left
        left -= 1
        passed = time.monotonic() - began
        rest = passed / (before - left) * left
        _say(f"{done:,} of {count:,} images, {passed:.0f} s passed, {rest:.0f} s left")

    draw(images, make, labels, told, distributed.is_first())
    if values.npz and distributed.is_first():
        join(images.folder, values.npz)
    if benchmark is not None and distributed.is_first():
        kind, prompts, each = benchmark
        write_benchmark(kind, images.folder / kind, prompts, read_drawn(images.folder, each))
    distributed.stop()
    _say(f"{count:,} images of step {int(state.step)} are in {values.out}")


def _benchmark(values: flags.FlagValues) -> tuple[str, list[Any], int] | None:
    """The benchmark of the flags: its name, its prompts, and the images of each."""
    from src.evals.scores.benchmarks import BENCHMARKS, GRID, read_benchmark

    if values.benchmark is None:
        return None
    if not values.prompts:
        raise ValueError(f"--benchmark={values.benchmark} needs --prompts, the file or folder of its prompts")
    each = values.each or BENCHMARKS[values.benchmark].each
    if values.benchmark == "dpg" and each != GRID:
        raise ValueError(f"--each={each}: the judge of dpg reads {GRID} images of a prompt, in one grid")
    return values.benchmark, read_benchmark(values.benchmark, values.prompts), each


def wanted(system: Any, values: flags.FlagValues, benchmark: Any = None) -> tuple[str, Any, np.ndarray | None]:
    """The task that draws, the example of each number, and the class of each (None: prompts).

    Raises ValueError where no task of the system draws images from classes, or from prompts.
    """
    from src.evals.given import choose_task, example_of, read_prompts
    from src.evals.tasks import count_classes

    tasks, fields = system.pipeline.tasks, system.fields
    if values.prompts:
        lines = read_prompts(values.prompts) if benchmark is None else [prompt.text for prompt in benchmark[1]]
        each = 1 if benchmark is None else benchmark[2]
        name = choose_task(tasks, {"prompt": lines[0]}, values.task)
        rows = [example_of(tasks[name], fields, {"prompt": line}) for line in lines]
        _check_draws(system, name)
        return name, lambda number: rows[number // each % len(rows)], None
    name = choose_task(tasks, {"label": "0"}, values.task)
    _check_draws(system, name)
    classes = count_classes(fields, tasks[name])
    labels = np.arange(values.count) % classes
    if values.classes == "random":
        labels = np.random.default_rng(values.seed).integers(0, classes, values.count)
    return name, lambda number: {"label": int(labels[number])}, labels


def _check_draws(system: Any, name: str) -> None:
    from src.interfaces import row_of

    made = system.pipeline.tasks[name].fill
    if len(made) != 1 or len(system.fields[row_of(made[0])].codec.delivered) != 3:
        raise ValueError(f"task {name} makes {', '.join(made)} and not one image: give another --task")


def _chosen(values: flags.FlagValues, labels: np.ndarray | None, benchmark: Any) -> dict[str, Any]:
    if labels is not None:
        return {"classes": values.classes}
    if benchmark is not None:
        lines = [prompt.text for prompt in benchmark[1]]
        return {"benchmark": benchmark[0], "prompts": hashlib.sha256("\n".join(lines).encode()).hexdigest()}
    with open(values.prompts, "rb") as file:
        return {"prompts": hashlib.sha256(file.read()).hexdigest()}


def _restored(values: flags.FlagValues, system: Any) -> tuple[Any, Any, dict[str, Any]]:
    """The state, the parameters that draw, and what decides the images."""
    from src.train.average import used_params
    from src.train.restored import restore_checkpoint
    from src.train.setting import setting_of
    from src.train.state import with_extras

    state = restore_checkpoint(system, values.workdir, values.step)
    params = used_params(state, system.config)
    about = {
        **setting_of(system.config, params),
        "config": config_flag.name_of(values),
        "workdir": values.workdir,
        "step": int(state.step),
        "rounding": "nearest",
    }
    return state, with_extras(state, params), about


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
