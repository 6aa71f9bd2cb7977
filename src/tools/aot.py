"""Compiles a config for a TPU pod on a machine without TPUs and says whether it fits and how fast it can be.

python -m src.tools.aot --config=configs/imagenet256.py --topology=v5e:8x8
python -m src.tools.aot --config=configs/imagenet256.py --topology=v5p:4x4x4 --config.mesh.fsdp=64 --json
python -m src.tools.aot --config=configs/imagenet256.py --topology=v5e:8x8 --search --limit=6
python -m src.tools.aot --config=configs/imagenet256.py --topology=v5e:2x4 --mode=sample
python -m src.tools.aot --config=configs/imagenet256.py --topology=v5e:8x8 --save=gs://my-bucket/imagenet256
python -m src.tools.aot --config=configs/digits.py:debug --platform=cpu --topology=8

The train step is the one that `src.main` would run, and so is the program of frozen encoders before it (without their
folders they are taken to be as published); nothing is allocated and no data is read. With --save a run in that workdir,
on such devices and with the same config, code and packages, starts without compiling the step. Exit codes: 0 it fits,
1 an error, 2 it does not fit. Needs libtpu (requirements-aot.txt), except with --platform=cpu.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from absl import flags
from ml_collections import config_flags

from src.common.runtime import command, config_flag
from src.tools.compile import topology as topologies
from src.tools.compile.chips import CHIPS, GIB

DOES_NOT_FIT = 2


def define() -> flags.FlagValues:
    """The flags, apart from those of `src.main`."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "The config file, e.g. configs/imagenet256.py.", flag_values=values)
    common = {"flag_values": values}
    flags.DEFINE_string("topology", "v5e:8x8", "The slice, e.g. v5p:4x4x4; with --platform=cpu a number.", **common)
    flags.DEFINE_integer("slices", 1, "How many such slices.", **common)
    flags.DEFINE_enum("platform", "tpu", ["tpu", "cpu"], "The real TPU compiler, or emulated CPU devices.", **common)
    flags.DEFINE_enum("chip", None, list(CHIPS), "Whose figures --platform=cpu takes (v5e).", **common)
    flags.DEFINE_float("hbm", None, "GiB of a chip to count with, instead of the published ones.", **common)
    flags.DEFINE_enum("mode", "train", ["train", "sample"], "The train step, or the samplers.", **common)
    flags.DEFINE_string("task", None, "--mode=sample: this task alone.", **common)
    flags.DEFINE_string("save", "", "--mode=train: the workdir that gets the compiled step, for its run.", **common)
    flags.DEFINE_boolean("json", False, "One JSON object on standard output.", **common)
    flags.DEFINE_boolean("search", False, "Try meshes, recomputation and microbatches.", **common)
    flags.DEFINE_integer("limit", 6, "--search: compile at most so many.", **common)
    flags.DEFINE_list("batches", [], "--search: batch sizes to try; the config's own by default.", **common)
    flags.DEFINE_boolean("traceback", False, "Show the whole traceback of an error.", **common)
    return values


def main(argv: list[str]) -> int:
    """The exit code; errors that a person can mend are one sentence on standard error."""
    values = define()

    def work() -> int:
        config = config_flag.parse(values, argv)
        if config is None:
            raise ValueError("give --config=configs/imagenet256.py or another")
        return run(values, config)

    return command.run(work, values)


def run(values: flags.FlagValues, config: Any) -> int:
    """Compiles and prints what was asked for."""
    if values.save and (values.search or values.mode != "train"):
        raise ValueError(f"--save={values.save} is for one train step: leave out --search and --mode=sample")
    topologies.prepare(values.platform, values.topology)
    topology = topologies.open_topology(values.platform, values.topology, values.slices, values.chip)
    hbm = topology.chip.hbm if values.hbm is None else values.hbm * GIB
    from src.tools.compile import programs, report, search, text  # after the environment: they import JAX

    title = _title(values)
    if values.platform == "cpu":
        title += f", compiled for emulated CPU devices and counted as {topology.chip.name}"
    if values.search:
        tried = []
        for report in search.search(config, topology, hbm, values.limit, [int(b) for b in values.batches]):
            tried.append(report)
            print(text.table(tried[-1:]).splitlines()[1], file=sys.stderr, flush=True)
        result: dict[str, Any] = {"config": title, "candidates": tried}
        shown, fits = f"{title} on {values.topology}\n{text.table(tried)}", any(map(programs.fits, tried))
    elif values.mode == "train":
        report = report.train_report(config, topology, hbm, save=values.save)
        fits, result = programs.fits(report), {"config": title, "mode": "train"} | report
        shown = text.describe(report, title)
        if saved := result.get("saved"):
            shown += f"\n  the step is in {saved['path']} ({saved['bytes'] / 1e6:.1f} MB)"
        if not fits:
            result["suggestion"] = search.suggestion(config, topology, hbm)
            shown += f"\n  {result['suggestion']}"
    else:
        found = report.sample_reports(config, topology, hbm, values.task)
        fits = all(r["memory"]["fits"] for r in found.values())
        result = {"config": title, "mode": "sample", "tasks": found}
        shown = "\n".join(
            text.describe(r, f"{title}, {config.sample.batch_size} rows of {name}") for name, r in found.items()
        )
        if not fits:
            result["suggestion"] = "fewer rows in one call: --config.sample.batch_size, or a larger mesh.fsdp"
            shown += f"\n  {result['suggestion']}"
    print(json.dumps(result | {"fits": fits}) if values.json else shown)
    return 0 if fits else DOES_NOT_FIT


def _title(values: flags.FlagValues) -> str:
    """The config's name with the changes on the command line."""
    changed = [a for a in values.flags_into_string().splitlines() if a.startswith("--config.")]
    return " ".join([os.path.relpath(config_flags.get_config_filename(values["config"])), *changed])


if __name__ == "__main__":
    sys.exit(main(sys.argv))
