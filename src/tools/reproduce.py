"""The paper's ablations at the size of digits, and one of our own: trains every run and writes the table.

python -m src.tools.reproduce --workdir=runs/ablations
python -m src.tools.reproduce --workdir=runs/quick --seeds=0 --debug

(a, b) Start from a text model or from scratch, seen from images and from text; (c) bidirectional or causal attention in
images; (d) a time token that is trained, or one that stays a constant. Each run is `python -m src.main` with
`configs/ablations_digits.py` in a folder of its own, and its output is in `<workdir>/logs`. The same command goes on
where it was stopped, and repeats nothing that is done. In the end `<workdir>/ablations.md`, `ablations.json` and
`curves.png` have means with standard errors over the seeds; a difference within two of them is no difference.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from absl import flags

from src.common.runtime import command, config_flag


def define() -> flags.FlagValues:
    """The flags."""
    values = flags.FlagValues()
    common = {"flag_values": values}
    flags.DEFINE_string("workdir", "runs/ablations", "The folder of all runs and of the table.", **common)
    flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds: a run of each arm for each.", **common)
    flags.DEFINE_integer("steps", None, "Steps of a run, instead of the config's.", 2, **common)
    flags.DEFINE_boolean("debug", False, "Tiny runs of a few steps, to try the command.", **common)
    flags.DEFINE_integer("cpu_devices", None, "Devices of a run on a CPU; unless given, one a core.", 1, **common)
    flags.DEFINE_boolean("traceback", False, "Show the whole traceback of an error.", **common)
    return values


def main(argv: list[str]) -> int:
    """The exit code; errors that a person can mend are one sentence on standard error."""
    values = define()

    def work() -> None:
        config_flag.parse_plain(values, argv, "workdir")
        run(values)

    return command.run(work, values, "interrupted; the same command goes on from there")


def run(values: flags.FlagValues) -> None:
    """Trains what is not yet trained, then writes and prints the table. Raises ValueError for wrong flags, RuntimeError
    for a run that failed."""
    seeds = _seeds(values.seeds)
    if not values.workdir.strip() or "://" in values.workdir:
        raise ValueError(f"--workdir={values.workdir} is no local folder: give one, as --workdir=runs/ablations")
    from src.tools.reports import jobs, plots

    if not plots.can_plot():
        _say(plots.MISSING)
    found = jobs.jobs_of(values.workdir, seeds, values.steps, values.debug, values.cpu_devices)
    jobs.run_all(found, os.path.join(values.workdir, "logs"), _say)
    report(values.workdir, found)


def report(workdir: str, found: list[Any]) -> None:
    """Writes `ablations.json`, `ablations.md` and, where matplotlib is there, `curves.png`; prints the table."""
    from src.common.files.store import write_named
    from src.tools.reports import ablations, plots
    from src.tools.reports.jobs import about_machine, read_done
    from src.tools.reports.run_files import METRICS, read_curves, read_metrics

    runs: dict[str, list[Any]] = {}
    about: dict[str, Any] = {}
    for job in found:
        numbers, _ = read_metrics(os.path.join(job.workdir, METRICS))
        about[job.name] = read_done(job) | {"numbers": numbers}
        if job.arm in ablations.ARMS:
            runs.setdefault(job.arm, []).append(ablations.FinishedRun(numbers, read_curves(job.workdir)))
    rows = {each.letter: ablations.compared(each, runs) for each in ablations.COMPARISONS}
    tables = [ablations.table(each, rows[each.letter]) for each in ablations.COMPARISONS if rows[each.letter]]
    seconds = sum(each["seconds"] for each in about.values())
    machine = about_machine()
    head = f"{len(found)} runs in {seconds / 60:.1f} minutes; seeds {', '.join(str(s) for s in seeds_of(found))}; "
    text = "\n\n".join([head + "; ".join(f"{k} {v}" for k, v in machine.items()), *tables]) + "\n"
    panels = ablations.panels(runs)
    told = {
        "machine": machine,
        "seconds": seconds,
        "limit": ablations.LIMIT,
        "comparisons": [
            {"letter": each.letter, "question": each.question, "first": each.first, "second": each.second}
            | {"measures": ablations.plain(rows[each.letter])}
            for each in ablations.COMPARISONS
        ],
        "curves": {panel.title: {arm: line._asdict() for arm, line in panel.lines.items()} for panel in panels},
        "runs": about,
    }
    write_named(os.path.join(workdir, "ablations.json"), (json.dumps(told, indent=1) + "\n").encode(), "report")
    write_named(os.path.join(workdir, "ablations.md"), text.encode(), "report")
    if plots.can_plot() and panels:
        plots.write_plot(os.path.join(workdir, "curves.png"), panels)
    print(text)
    print(f"written to {workdir}/ablations.md and ablations.json")


def seeds_of(found: list[Any]) -> list[int]:
    """The seeds of jobs, in order."""
    return sorted({job.seed for job in found})


def _seeds(texts: list[str]) -> list[int]:
    if not texts or not all(text.strip().isdigit() for text in texts) or len({int(t) for t in texts}) < len(texts):
        raise ValueError(f"--seeds={','.join(texts)} are no different whole numbers: give some, as --seeds=0,1,2")
    return [int(text) for text in texts]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
