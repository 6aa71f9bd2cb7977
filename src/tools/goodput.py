"""Prints and draws where the time of a run went, over all its restarts.

python -m src.tools.goodput --workdir=runs/digits
python -m src.tools.goodput --workdir=runs/digits --out=goodput.png

The figures are those of `goodput.jsonl` (`src/train/goodput.py`), which a training run writes. The image has a bar for
the whole run, and one for each process. Reads only, so the run may still be at work.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence

import numpy as np
from absl import flags
from etils import epath
from PIL import Image, ImageDraw, ImageFont

from src.common.files.store import check_store
from src.common.runtime import command, config_flag
from src.evals.grid import save_png
from src.train.goodput import FILE, LOST, PARTS, Attempt, read_attempts, summary

ORDER = ("steps", "data", "save", "evaluate", "compile", "start", "other", LOST)
COLORS = ("#2e8b57", "#e0a030", "#4682b4", "#8a6fb0", "#b0b0b0", "#707070", "#d8d8d8", "#c03030")
MOST = 40  # processes that are shown: the last ones
LABEL, BAR, HEIGHT, GAP, FONT = 150, 720, 18, 8, 13  # pixels


def define() -> flags.FlagValues:
    """The flags."""
    values = flags.FlagValues()
    common = {"flag_values": values}
    flags.DEFINE_string("workdir", None, "The folder of the run.", **common)
    flags.DEFINE_string("out", None, "The PNG to write; <workdir>/goodput.png unless given.", **common)
    flags.DEFINE_boolean("traceback", False, "Show the whole traceback of an error.", **common)
    return values


def main(argv: list[str]) -> int:
    """The exit code; errors that a person can mend are one sentence on standard error."""
    values = define()

    def work() -> None:
        config_flag.parse_plain(values, argv, "workdir")
        run(values.workdir, values.out)

    return command.run(work, values)


def run(workdir: str | None, out: str | None = None) -> None:
    """Prints the table of a run and writes the image. Raises ValueError or OSError, in one sentence."""
    if not (workdir or "").strip():
        raise ValueError("no workdir is given: add --workdir=runs/<name>, the folder of a run")
    check_store(workdir)
    path = epath.Path(workdir) / FILE
    attempts = read_attempts(path)
    if not attempts:
        raise ValueError(f"there is no account of a run in {path}: give the --workdir of a run that has trained")
    print(table(attempts))
    target = out or str(epath.Path(workdir) / "goodput.png")
    save_png(target, draw(attempts))
    print(f"drawn in {target}")


def table(attempts: Sequence[Attempt]) -> str:
    """Seconds and shares of the whole run, then a line for each of the last processes."""
    whole = parts_of(attempts)
    total = sum(whole.values())
    lines = [f"{'':<10}{'seconds':>12}{'share':>9}"]
    lines += [f"{part:<10}{value:>12,.1f}{_share(value, total):>9}" for part, value in whole.items()]
    lines += [f"{'in all':<10}{total:>12,.1f}{_share(total, total):>9}", ""]
    told = summary(attempts)
    again, restarts = int(told["goodput/lost_steps"]), int(told["goodput/restarts"])
    lines.append(f"goodput {told['goodput']:.1%}; restarts {restarts}, steps done again {again}")
    if (unknown := sum(gaps(attempts))) > 0:
        lines.append(f"not known, and not counted: {unknown:,.1f} s from last records of processes to the next starts")
    lines += ["", f"{'process':<9}{'from':>9}{'to':>9}{'seconds':>12}" + "".join(f"{part:>10}" for part in ORDER)]
    for each in attempts[-MOST:]:
        values = parts_of([each])
        about = f"{each.last.attempt:<9}{each.last.begun:>9,}{each.last.step:>9,}{each.last.total:>12,.1f}"
        lines.append(about + "".join(f"{values[part]:>10,.1f}" for part in ORDER))
    return "\n".join(lines)


def parts_of(attempts: Sequence[Attempt]) -> dict[str, float]:
    """Seconds by part, in the order of the table; they add up to the time of the processes."""
    told = summary(list(attempts))
    assert set(ORDER) == {*PARTS, LOST}
    return {part: told[f"goodput/{part}"] for part in ORDER}


def gaps(attempts: Sequence[Attempt]) -> list[float]:
    """Seconds, by the clock, from the last record of each process to the start of the next; 0 where the clock was set
    back."""
    pairs = itertools.pairwise(attempts)
    return [max(new.first.time - new.first.total - old.last.time, 0.0) for old, new in pairs]


def draw(attempts: Sequence[Attempt]) -> np.ndarray:
    """Bars `[H, W, 3]` uint8: of the whole run as wide as the image, of each process in proportion to the longest."""
    shown = attempts[-MOST:]
    longest = max(sum(parts_of([each]).values()) for each in shown)
    rows = [("the run", parts_of(attempts), sum(parts_of(attempts).values()))]
    rows += [(f"{e.last.attempt}: {e.last.begun}-{e.last.step}", parts_of([e]), longest) for e in shown]
    font = ImageFont.load_default(size=FONT)
    legend = GAP + HEIGHT + GAP
    page = Image.new("RGB", (LABEL + BAR + 2 * GAP, legend + len(rows) * (HEIGHT + GAP) + GAP), "white")
    pen, left = ImageDraw.Draw(page), LABEL
    for part, color in zip(ORDER, COLORS, strict=True):
        pen.rectangle((left, GAP + 3, left + 11, GAP + 14), fill=color)
        pen.text((left + 15, GAP), part, fill="black", font=font)
        left += BAR // len(ORDER)
    for number, (label, values, scale) in enumerate(rows):
        _bar(pen, legend + number * (HEIGHT + GAP), label, values, scale, font)
    return np.asarray(page)


def _bar(pen: ImageDraw.ImageDraw, top: int, label: str, values: Mapping[str, float], scale: float, font: object):
    pen.text((GAP, top), label, fill="black", font=font)
    done = 0.0
    for part, color in zip(ORDER, COLORS, strict=True):
        begin, done = done, done + values[part]
        ends = [LABEL + round(BAR * second / scale) if scale else LABEL for second in (begin, done)]
        if ends[1] > ends[0]:
            pen.rectangle((ends[0], top, ends[1] - 1, top + HEIGHT - 1), fill=color)


def _share(value: float, total: float) -> str:
    return f"{value / total:.1%}" if total else ""


if __name__ == "__main__":
    sys.exit(main(sys.argv))
