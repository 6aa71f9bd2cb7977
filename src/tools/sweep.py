"""Measures a run at all combinations of some settings, as a table and a plot of one metric against the others.

python -m src.tools.sweep --config=configs/digits.py --workdir=runs/digits guidance=1,1.5,2 steps=10,25
python -m src.tools.sweep --config=configs/digits.py --workdir=runs/digits ema=0.99,0.995,last step=1000,1500
python -m src.tools.sweep --config=configs/imagenet256.py --workdir=runs/imagenet256 --out=sweep guidance=1,1.25,1.5 \\
    --reference=VIRTUAL_imagenet256_labeled.npz --weights=pt_inception-2015-12-05-6726825d.pth --count=10000

Words are `name=value,value,…`: `guidance`, `steps` (of the decoders), `sampler`, `ema` (decays that the run keeps, or
`last`), `width` (of power averages), `step` (checkpoints), or a dotted field of the config. Without --reference the
evaluators of the config measure; with it images are drawn by `src.tools.draw` and scored by `src.tools.scores`, in a
folder for each combination. What is measured is kept in <out>/sweep.json, and the same command goes on where it was
stopped.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from absl import flags

from src.common.runtime import command, config_flag
from src.tools.datasets.sources import flags_of_config

NETWORKS = ["inception", "dinov2", "clip", "pixels"]  # those of src.tools.scores


def define() -> flags.FlagValues:
    """The flags."""
    values = flags_of_config("The config of the run.")
    common = {"flag_values": values}
    flags.DEFINE_string("workdir", None, "The run.", **common)
    flags.DEFINE_string("out", None, "The folder of the results; <workdir>/sweep unless given.", **common)
    flags.DEFINE_list("metrics", [], "What is shown, the first one against the others; all unless given.", **common)
    flags.DEFINE_string("reference", None, "Of src.tools.scores: real images, or their moments.", **common)
    flags.DEFINE_enum("network", "inception", NETWORKS, "--reference: whose features.", **common)
    flags.DEFINE_string("weights", None, "--reference: the file of the network.", **common)
    flags.DEFINE_string("task", None, "--reference: the task that draws, where there are several.", **common)
    flags.DEFINE_string("prompts", None, "--reference: a text file with a prompt in each line, not classes.", **common)
    flags.DEFINE_integer("count", 10_000, "--reference: images of each combination.", 1, **common)
    flags.DEFINE_integer("seed", None, "Of the noise; the config's, with --reference 0, unless given.", 0, **common)
    flags.DEFINE_integer("cpu_devices", None, "Devices on a CPU; unless given, one a core.", **common)
    return values


def main(argv: list[str]) -> int:
    """The exit code; errors that a person can mend are one sentence on standard error."""
    values = define()

    def work() -> None:
        from src.tools.reports.sweep_axes import split_axes

        words, axes = split_axes(argv)
        run(values, config_flag.parse(values, words), axes)

    return command.run(work, values, "interrupted; the same command goes on from there")


def run(values: flags.FlagValues, config: Any, words: list[str]) -> None:
    """Measures what is not measured yet, and writes the results. Raises ValueError, before anything is read, for flags
    and words that do not fit."""
    from src.common.mesh import distributed
    from src.tools.reports.sweep_axes import changed, parse_axes, points_of

    if distributed.is_named(os.environ):
        raise ValueError(
            "a sweep is one process, and the environment names several (JAX_NUM_PROCESSES, JAX_DISTRIBUTED): start it"
            " without them, or have src.main --mode=eval measure one setting on all of them"
        )
    for name in ("config", "workdir"):
        if not values[name].value:
            raise ValueError(f"give --{name}: --config=… and the --workdir of its run")
    axes = parse_axes(words, config)
    points = points_of(axes)
    if not values.reference and not config.eval.evaluators:
        raise ValueError("the config has no evaluators, so that nothing is measured: give --reference, real images")
    if values.reference and values.network != "pixels" and not values.weights:
        raise ValueError("--reference needs --weights, the file of the network, or --network=pixels")
    if not values.reference and values.seed is not None:
        config.seed = values.seed
    out = values.out or os.path.join(values.workdir, "sweep")
    from src.tools.reports import sweeping
    from src.train.average import check_chosen

    for point in points:
        check_chosen(changed(config, point), afterwards=True)
    kept = sweeping.Results(out, sweeping.about_of(values, config))
    waiting = [point for point in points if not kept.has(point)]
    if len(waiting) < len(points):
        _say(f"{len(points) - len(waiting)} of {len(points)} combinations are measured already")
    measure = None
    began = time.monotonic()
    for number, point in enumerate(waiting):
        if measure is None:
            measure = sweeping.scorer(values, out) if values.reference else sweeping.evaluator(values, config)
        found, setting = measure(point)
        kept.add(point, found, setting)
        left = (time.monotonic() - began) / (number + 1) * (len(waiting) - number - 1)
        _say(f"{number + 1} of {len(waiting)}: {sweeping.told(point)}; about {left / 60:.1f} minutes left")
    show(kept, axes, points, values.metrics)


def show(kept: Any, axes: list[Any], points: list[Any], metrics: list[str]) -> None:
    """Prints the table and writes `sweep.md` and, with matplotlib, `sweep.png`. Raises ValueError for a metric that
    nothing measured."""
    from src.common.files.store import write_named
    from src.tools.reports import plots, sweeping

    rows = [(point, kept.numbers(point)) for point in points]
    names = list(dict.fromkeys(name for _, numbers in rows for name in numbers))
    if wrong := [name for name in metrics if name not in names]:
        raise ValueError(f"--metrics: nothing measured {wrong[0]}; there are {', '.join(names)}")
    names = metrics or names
    text = sweeping.table(axes, rows, names)
    print(text)
    write_named(os.path.join(kept.folder, "sweep.md"), (text + "\n").encode(), "table")
    if plots.can_plot():
        plots.write_plot(os.path.join(kept.folder, "sweep.png"), sweeping.panels(axes, rows, names))
    else:
        _say(plots.MISSING)
    _say(f"written to {kept.folder}: sweep.json has the setting of each number")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
