"""Measures how fast a config trains, draws and writes on this machine.

python -m src.tools.bench --config=configs/digits.py
python -m src.tools.bench --config=configs/digits.py --json=bench.json --only=step,data
python -m src.tools.bench --config=configs/digits.py --only=save --save_gb=1 --config.mesh.fsdp=-1 --config.mesh.data=1
python -m src.tools.bench --config=configs/digits.py --peer=transformers
python -m src.tools.bench --config=configs/llava_journeydb.py --only=encode
python -m src.tools.bench --preset=accelerator --json=chip.json
python -m src.tools.bench --config=configs/digits.py --json=new.json --compare=old.json

Times are medians of calls that are waited for. `mfu` is the model's operations (`flops.py`) over time and over
the fastest matrix product that this run measured. `--peer` also times a PyTorch model of the same sizes that does the
same work, alternately with ours (requirements-peers.txt).
`--preset=accelerator` needs no config and no files: what one GPU or TPU chip does with the paper's model, in at most
`--minutes`, with a table beside the JSON file. `--compare` prints each figure beside that of an earlier run, and ends
with exit code 2 where some are worse by more than `--worse`, which it names.
"""

import time

STARTED = time.monotonic()

import importlib.util  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from collections.abc import Mapping, Sequence  # noqa: E402
from typing import Any  # noqa: E402

from absl import flags  # noqa: E402
from ml_collections import config_flags  # noqa: E402

from src.common.runtime import command, config_flag  # noqa: E402

PARTS = ("step", "data", "sample", "decode", "save", "peer", "encode")
DEFAULT = PARTS[:5]
COMPARED = ("step", "sample", "decode")  # what a peer does, too


def bench(
    config: Any,
    parts: tuple[str, ...] = DEFAULT,
    *,
    peer: str | None = None,
    seconds: float = 5.0,
    steps: int = 0,
    started: float | None = None,
    devices: Sequence[Any] | None = None,
    peak_size: int | None = None,
    save_gb: float = 0.0,
    title: str = "",
) -> dict[str, Any]:
    """All figures by part; each part carries machine, versions, date and the `title` of the config.

    Raises ValueError for an unknown part or peer, and when the peer does not compute what we compute.
    """
    from src.tools.benchmarks import clock
    from src.tools.benchmarks import parts as measure

    _check(parts, peer)
    started = time.monotonic() if started is None else started
    figures: dict[str, Any] = {}
    if "encode" in parts:
        from src.build import build_system
        from src.tools.benchmarks.encoders import measure_encoders

        figures["encode"] = measure_encoders(build_system(config), seconds, steps, _say, peak_size)
    if set(parts) > {"encode"} or "encode" not in parts:
        run = measure.start(config, started, seconds, steps, _say, devices)
        figures["first_step"] = run.first
    if "step" in parts:
        _say("matrix products")
        figures["peak"] = clock.peaks(min(seconds, 2.0), steps, peak_size)
        figures["step"] = measure.measure_step(run, figures["peak"])
    if "data" in parts:
        median = figures["step"]["seconds"]["median"] if "step" in figures else None
        figures["data"] = measure.measure_data(run, median)
    if "sample" in parts:
        figures["sample"] = measure.measure_sample(run)
    if "decode" in parts:
        figures["decode"] = measure.measure_decode(run)
    if "save" in parts:
        from src.tools.benchmarks import save

        _say("saving")
        state = save.random_state(save_gb, run.trainer.mesh) if save_gb else run.state
        figures["save"] = save.measure_saves(state, count=steps or save.COUNT)
    if "peer" in parts:
        from src.tools.benchmarks.peer import measure_peer

        compared = tuple(part for part in COMPARED if part in parts) or COMPARED
        figures["peer"] = measure_peer(run, peer or "transformers", compared)
    from src.train.checkpoints.metadata import VERSION

    here = clock.where() | {"config": title, "version": VERSION}
    return {name: group | {"where": here} for name, group in figures.items()}


def _check(parts: tuple[str, ...], peer: str | None) -> None:
    """Refuses parts and peers that cannot be measured, before anything is."""
    if "peer" in parts:
        missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
        if missing:
            raise ImportError(f"{' and '.join(missing)} is missing: pip install -r requirements-peers.txt")
        if importlib.util.find_spec(f"src.tools.benchmarks.peers.{peer or 'transformers'}") is None:
            raise ValueError(f"--peer={peer} is no file of src/tools/benchmarks/peers; there is transformers")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ValueError(f"--only={unknown[0]} is no part of the bench; there are {', '.join(PARTS)}")


def table(figures: Mapping[str, Any], indent: str = "") -> str:
    """The figures as lines of name and value, groups below their names."""
    lines = []
    for name, value in figures.items():
        if name == "where":
            continue
        if isinstance(value, Mapping) and set(value) == {"median", "p10", "p90", "count"}:
            value = f"{_number(value['median'])} ({_number(value['p10'])} to {_number(value['p90'])}, {value['count']})"
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}", table(value, indent + "  ")]
        else:
            lines.append(f"{indent}{name:<{38 - len(indent)}}{_number(value)}")
    return "\n".join(lines)


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**9 else f"{value:.4g}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.4g}"


def _say(what: str) -> None:
    print(f"[{time.monotonic() - STARTED:6.1f} s] {what} …", file=sys.stderr, flush=True)


def define() -> flags.FlagValues:
    """The flags."""
    values = flags.FlagValues()
    common = {"flag_values": values}
    config_flags.DEFINE_config_file("config", None, "The config file.", **common)
    told = f"Parts to measure, of {', '.join(PARTS)}; by default all but the last two. The peer does those of"
    told += f" {', '.join(COMPARED)} that are named, or all three where none is."
    flags.DEFINE_list("only", None, told, **common)
    flags.DEFINE_float("seconds", 5.0, "How long each part is measured.", **common)
    flags.DEFINE_integer("steps", 0, "Calls of each part, instead of --seconds.", 0, **common)
    flags.DEFINE_string("json", None, "File that gets the figures.", **common)
    flags.DEFINE_float("save_gb", 0.0, "--only=save: random numbers, not the state.", **common)
    flags.DEFINE_integer("cpu_devices", None, "Devices on a CPU; unless given, one a core, if rows divide.", **common)
    flags.DEFINE_string("peer", None, "A file of src/tools/benchmarks/peers: transformers.", **common)
    flags.DEFINE_enum("preset", None, ["accelerator"], "What one GPU or TPU chip does, without a config.", **common)
    flags.DEFINE_float("minutes", 8.0, "--preset: what is not begun by then is named as not run.", **common)
    flags.DEFINE_string("compare", None, "A file of --json: its figures beside the new ones.", **common)
    flags.DEFINE_string("new", None, "--compare: a file of --json in place of measuring.", **common)
    flags.DEFINE_float("worse", 0.05, "--compare: share by which a figure may be worse.", 0.0, **common)
    return values


def main(argv: list[str]) -> int:
    """Exit code; errors that a person can mend are one sentence on standard error."""
    values = define()
    return command.run(lambda: _run(values, argv), values)


def _run(values: flags.FlagValues, argv: list[str]) -> int:
    config = config_flag.parse(values, argv)
    from src.tools.benchmarks import accelerator, compare

    old = compare.read_figures(values.compare) if values.compare else None
    if values.new and old is None:
        raise ValueError("--new is compared with --compare, which is missing: add --compare=old.json")
    if values.new:
        figures = compare.read_figures(values.new)
    elif values.preset:
        figures = accelerator.measure(values.minutes, _say, tuple(values.only or accelerator.LIMITS))
    elif config is None:
        raise ValueError(
            "no config is given: add --config=configs/digits.py (or another file of configs/), or --preset=accelerator"
        )
    else:
        figures = _measured(values, config)
    if figures is None:
        return 0
    if not values.new:
        _show(values, figures)
    if old is None:
        return 0
    found = compare.compare(old, figures, values.worse, _number)
    print("\n".join(["", f"{values.compare} and now: old, new, new / old", *found.lines]))
    if found.worse:
        print(f"worse by more than {values.worse:.0%}: {'; '.join(found.worse)}")
    return compare.WORSE if found.worse else 0


def _measured(values: flags.FlagValues, config: Any) -> dict[str, Any] | None:
    """The figures of a config; None in a process that is not the first."""
    from src.build import rows_of
    from src.common.mesh import distributed
    from src.common.runtime import cpu_devices
    from src.tools.datasets import debug_files

    if told := cpu_devices.start(config, rows_of(config), values.cpu_devices):
        _say(told)
    distributed.start()
    title = " ".join([config_flag.name_of(values), *(f"{k}={v}" for k, v in config_flag.overrides(values).items())])
    debug_files.fill_for(values)
    parts = tuple(values.only or [*DEFAULT, *(["peer"] if values.peer else [])])
    options = {name: values[name].value for name in ("peer", "seconds", "steps", "save_gb")}
    figures = bench(config, parts, started=STARTED, title=title, **options)
    first = distributed.is_first()
    distributed.stop()
    return figures if first else None


def _show(values: flags.FlagValues, figures: Mapping[str, Any]) -> None:
    """Prints the figures and writes them; those of a preset also as a table of Markdown beside the file."""
    from src.tools.benchmarks import accelerator

    shown = accelerator.markdown(figures, _number) if values.preset else table(figures)
    if not values.preset:
        where = next(iter(figures.values()))["where"]
        print(", ".join(f"{name} {value}" for name, value in where.items()))
        print("times in seconds, as median (10th to 90th percentile, calls); memory in bytes; mfu: share of the peak\n")
    print(shown)
    if values.json:
        os.makedirs(os.path.dirname(values.json) or ".", exist_ok=True)
        with open(values.json, "w") as file:
            json.dump(figures, file, indent=2)
        if values.preset:
            with open(f"{os.path.splitext(values.json)[0]}.md", "w") as file:
                file.write(shown)
        print(f"written to {values.json}")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
