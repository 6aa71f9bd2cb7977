"""A look at a few rows of a task before anything slow starts: can they be used?"""

from __future__ import annotations

import numpy as np

from src.data.example import BadRow
from src.data.pipeline.bad_rows import TooManyBadRowsError, grouped
from src.data.pipeline.reader import Rows

LOOKED = 32  # rows of a split, at most
NEARLY = 0.9  # share of bad rows from which on a source is taken for unreadable
SHOWN = 3


def check_rows(name: str, task: Rows, *, share: float | int = 0.0, split: str = "train") -> None:
    """Reads some rows of a split, the first ones and others all over it, until enough of them are sound.

    share   of bad rows that the config allows (`data.max_bad.share`); a source whose rows are all bad is refused anyway

    Raises TooManyBadRowsError, which shows the first bad rows with their reasons, when all or nearly all are bad, and
    as `Rows.rows`.
    """
    count = task.rows(split)
    rng, few = np.random.default_rng(0), min(count, LOOKED)
    chosen = dict.fromkeys([*range(min(count, SHOWN)), *rng.choice(count, few, replace=False).tolist()])
    chosen = rng.permutation([*chosen][:few])
    bad: dict[int, BadRow] = {}
    for seen, row in enumerate(chosen.tolist(), 1):
        try:
            task.read(split, row, None)
        except BadRow as flaw:
            if flaw.rest is None:
                bad[row] = flaw
        if seen - len(bad) > (1 - NEARLY) * len(chosen):
            return
    if len(bad) < len(chosen) and len(bad) <= share * len(chosen):
        return
    first = [bad[row] for row in sorted(bad)[:SHOWN]]
    told = grouped((flaw.where, flaw.reason, flaw.detail) for flaw in first)
    raise TooManyBadRowsError(
        f"task {name}: {len(bad)} of {len(chosen)} rows that were looked at cannot be used: {told}: mend the data, or"
        " choose a source that reads them"
    )
