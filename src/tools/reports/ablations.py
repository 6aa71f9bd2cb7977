"""The ablations on digits: their arms, what is compared, means with standard errors, and the table of them."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from src.tools.reports.plots import Line, Panel
from src.tools.reports.run_files import Curve

# Arms by name: the variant of configs/ablations_digits.py. `pretrained` begins with the weights of a run of TEXT.
ARMS = {"base": "", "pretrained": "pretrained", "causal": "causal", "dead": "dead"}
TEXT = "text"
BEGUN = "pretrained"
LIMIT = 2.0  # standard errors up to which a difference is none


class Measure(NamedTuple):
    """A number of a run: its name in `metrics.json`, or that of a curve, whose last value counts."""

    name: str
    label: str
    higher: bool


class Ablation(NamedTuple):
    """Two arms, called `first_is` and `second_is`, and the numbers that tell them apart."""

    letter: str
    question: str
    first: str
    first_is: str
    second: str
    second_is: str
    measures: tuple[Measure, ...]


MSE = Measure("heldout/caption_to_image/diffusion/mse", "images, held-out mse", False)
CAPTIONS = Measure("heldout/image_to_caption/text/nll", "captions, held-out nll", False)
SENTENCES = Measure("heldout/number_sentences/text/nll", "sentences, held-out nll", False)
DRAWN = (
    MSE,
    Measure("digit_accuracy", "`digit_accuracy`", True),
    Measure("frechet_distance", "`frechet_distance`", False),
    Measure("fdpx", "`fdpx`", False),
)
READ = (CAPTIONS, Measure("caption_accuracy", "`caption_accuracy`", True))
WRITTEN = (SENTENCES, Measure("text_accuracy", "`text_accuracy`", True))
START = ("pretrained", "text-pretrained", "base", "from scratch")
COMPARISONS = (
    Ablation("a", "Start from a text model or from scratch, seen from images", *START, DRAWN),
    Ablation("b", "The same, seen from text", *START, (*WRITTEN, *READ)),
    Ablation("c", "Attention in images", "base", "bidirectional", "causal", "causal", (*DRAWN, *READ)),
    Ablation("d", "Time token", "base", "trained", "dead", "dead", DRAWN),
)
CURVES = (MSE, CAPTIONS, SENTENCES)


@dataclasses.dataclass(frozen=True)
class Summary:
    """Values of one arm by seed, their mean, and its standard error s / sqrt(n), None of a single value."""

    values: tuple[float, ...]
    mean: float
    error: float | None


def summary(values: Sequence[float]) -> Summary:
    """Mean and standard error, from the sample's standard deviation (n - 1)."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return Summary(tuple(values), statistics.fmean(values), error)


@dataclasses.dataclass(frozen=True)
class Compared:
    """A number of two arms: the difference of their means (first - second), its standard error, and what it means."""

    measure: Measure
    first: Summary
    second: Summary
    difference: float
    error: float | None
    verdict: str


def compare(measure: Measure, first: Sequence[float], second: Sequence[float], names: tuple[str, str]) -> Compared:
    """Two arms, whose seeds count as independent: error² is the sum of the squares of their standard errors.

    The verdict is `no difference` up to `LIMIT` standard errors, else which of `names` is better; `one seed` without an
    error.
    """
    left, right = summary(first), summary(second)
    difference = left.mean - right.mean
    if left.error is None or right.error is None:
        return Compared(measure, left, right, difference, None, "one seed")
    error = math.hypot(left.error, right.error)
    better = names[0] if (difference > 0) == measure.higher else names[1]
    verdict = "no difference" if abs(difference) <= LIMIT * error else f"{better} is better"
    return Compared(measure, left, right, difference, error, verdict)


class FinishedRun(NamedTuple):
    """A finished run: the numbers of its evaluations, and the curves of its log."""

    numbers: Mapping[str, float]
    curves: Mapping[str, Curve]

    def value(self, measure: Measure) -> float | None:
        """The number of this measure, None where the run has none."""
        if measure.name in self.numbers:
            return float(self.numbers[measure.name])
        curve = self.curves.get(measure.name)
        return curve[-1][1] if curve else None


def compared(comparison: Ablation, runs: Mapping[str, Sequence[FinishedRun]]) -> list[Compared]:
    """The measures of a comparison that both of its arms have in each of their runs (`runs`: by arm)."""
    names, found = (comparison.first_is, comparison.second_is), []
    for measure in comparison.measures:
        values = [[run.value(measure) for run in runs.get(arm, ())] for arm in (comparison.first, comparison.second)]
        if all(each and None not in each for each in values):
            found.append(compare(measure, *values, names))
    return found


def table(comparison: Ablation, rows: Sequence[Compared]) -> str:
    """A comparison as a Markdown table below its question."""
    lines = [f"**({comparison.letter}) {comparison.question}**", ""]
    lines.append(f"| | {comparison.first_is} | {comparison.second_is} | difference | result |")
    lines.append("|---|---|---|---|---|")
    for row in rows:
        arrow = "higher" if row.measure.higher else "lower"
        cells = [f"{row.measure.label} ({arrow} is better)", _with_error(row.first.mean, row.first.error)]
        cells += [_with_error(row.second.mean, row.second.error), _with_error(row.difference, row.error, "+")]
        lines.append(f"| {' | '.join([*cells, row.verdict])} |")
    return "\n".join(lines)


def _with_error(value: float, error: float | None, sign: str = "") -> str:
    return f"{value:{sign}.4f}" + ("" if error is None else f" ± {error:.4f}")


def mean_curves(runs: Sequence[FinishedRun], name: str) -> Line | None:
    """The mean curve of an arm's runs at the steps that all of them have, with the standard error as its spread."""
    curves = [dict(run.curves.get(name, ())) for run in runs]
    steps = sorted(set.intersection(*map(set, curves))) if curves else []
    points = [summary([curve[step] for curve in curves]) for step in steps]
    if not points:
        return None
    return Line(steps, [p.mean for p in points], [p.error or 0.0 for p in points])


def panels(runs: Mapping[str, Sequence[FinishedRun]]) -> list[Panel]:
    """The held-out losses of all arms, a panel for each loss."""
    found = []
    for measure in CURVES:
        lines = {arm: mean_curves(each, measure.name) for arm, each in runs.items()}
        if lines := {arm: line for arm, line in lines.items() if line is not None}:
            found.append(Panel(measure.label, lines))
    return found


def plain(rows: Sequence[Compared]) -> list[dict[str, Any]]:
    """JSON values of compared numbers."""
    return [dataclasses.asdict(row) | {"measure": row.measure._asdict()} for row in rows]
