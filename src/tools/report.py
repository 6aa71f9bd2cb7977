"""A report of a run, or of two side by side: every score with its setting, sample grids, curves and time.

python -m src.tools.report --workdir=runs/digits
python -m src.tools.report --workdir=runs/digits --compare=runs/digits-1 --out=compared
python -m src.tools.report --workdir=runs/imagenet256 --scores=scores.json,language.json

Writes `report.md`, `report.json` and, with matplotlib, `report.png` into the workdir, or into --out. Scores are those
of `metrics.json` and `metrics-<step>.json`, and the reports (--json) of `src.tools.scores`, `lm_eval` and `perplexity`
that lie in the workdir or are named by --scores. Scores of different steps or settings stand in different tables, and
are not compared. What is not there is named. Reads only, so the run may still be at work.
"""

from __future__ import annotations

import json
import os
import sys

from absl import flags

from src.common.runtime import command, config_flag


def define() -> flags.FlagValues:
    """The flags."""
    values = flags.FlagValues()
    common = {"flag_values": values}
    flags.DEFINE_string("workdir", None, "The folder of the run.", **common)
    flags.DEFINE_string("compare", None, "The folder of another run, beside it.", **common)
    flags.DEFINE_list("scores", [], "Reports of other tools about this run (--json), that lie elsewhere.", **common)
    flags.DEFINE_string("out", None, "The folder to write; the workdir unless given.", **common)
    flags.DEFINE_boolean("traceback", False, "Show the whole traceback of an error.", **common)
    return values


def main(argv: list[str]) -> int:
    """The exit code; errors that a person can mend are one sentence on standard error."""
    values = define()

    def work() -> None:
        config_flag.parse_plain(values, argv, "workdir")
        run(values)

    return command.run(work, values)


def run(values: flags.FlagValues) -> None:
    """Reads the runs and writes the report. Raises ValueError or OSError, in one sentence."""
    if not (values.workdir or "").strip():
        raise ValueError("no workdir is given: add --workdir=runs/<name>, the folder of a run")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed
    from src.common.files.store import check_store, write_named
    from src.tools.reports import plots, report_text, scores
    from src.tools.reports.run_report import plain, read_run

    folders = [values.workdir, *([values.compare] if values.compare else [])]
    for folder in folders:
        check_store(folder)
    runs = [read_run(folder, values.scores if number == 0 else ()) for number, folder in enumerate(folders)]
    out = values.out or values.workdir
    panels = report_text.panels(runs)
    plot = os.path.join(out, "report.png") if panels and plots.can_plot() else None
    if plot:
        plots.write_plot(plot, panels)
    elif panels:
        runs[0].missing.append(plots.MISSING)
    told = {"runs": [plain(each) for each in runs]}
    if len(runs) == 2:
        pairs, apart = scores.paired(runs[0].scores, runs[1].scores)
        told["compared"] = [
            {"name": name, "first": one._asdict(), "second": other._asdict(), "difference": other.value - one.value}
            for name, one, other in pairs
        ]
        told["not_compared"] = apart
    write_named(os.path.join(out, "report.json"), (json.dumps(told, indent=1) + "\n").encode(), "report")
    write_named(os.path.join(out, "report.md"), report_text.report_of(runs, out, plot).encode(), "report")
    for text in dict.fromkeys(f"{each.workdir}: {text}" for each in runs for text in each.missing):
        print(f"missing: {text}")
    count = sum(len(each.scores) for each in runs)
    print(f"{count} scores; written to {os.path.join(out, 'report.md')} and report.json")


if __name__ == "__main__":
    sys.exit(main(sys.argv))
