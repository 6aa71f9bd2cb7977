"""The progress of a run in one line: live on a terminal, as log lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

import jax
from absl import logging

RATES = {"tokens_per_second": "tok/s", "images_per_second": "img/s"}


class Progress:
    """Shows step, losses, rates and the time left; on process 0 only.

    `update` shows the metrics whose first path component is `loss` (`loss`, `loss/text`, …) and, where given,
    `tokens_per_second` and `images_per_second`. `total` and `start` are steps; `stream` defaults to standard error.
    """

    def __init__(self, total: int, start: int = 0, stream: TextIO | None = None):
        self.total = total
        self._first, self._began = start, None  # the clock starts at the first update: what comes before is compilation
        self._active = jax.process_index() == 0
        self._bar: Any = None
        stream = sys.stderr if stream is None else stream
        if self._active and stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, file=stream, dynamic_ncols=True, unit="step")

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Shows that `step` steps are done, with the metrics of the last one (scalars)."""
        if not self._active:
            return
        text = describe(metrics)
        if self._began is None:
            self._first, self._began = step, time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            self._bar.refresh()
        else:
            logging.info("step %d/%d%s, %s left", step, self.total, f", {text}" if text else "", self._left(step))

    def close(self) -> None:
        """Leaves the last line on the terminal."""
        if self._bar is not None:
            self._bar.close()

    def _left(self, step: int) -> str:
        done = step - self._first
        if done <= 0:
            return "unknown time"
        seconds = (time.monotonic() - self._began) / done * max(self.total - step, 0)
        minutes, seconds = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def describe(metrics: Mapping[str, Any]) -> str:
    """Rates and losses in words, names as short as they can be: `"12.3k tok/s, loss 2.31, text 1.2"`.

    `loss/task/objective/term` is called by its task, and by the rest only where a task has several terms.
    """
    parts = [f"{_short(float(metrics[name]))} {unit}" for name, unit in RATES.items() if name in metrics]
    names = [name for name in metrics if name.split("/")[0] == "loss"]
    tasks = [name.split("/")[1] for name in names if "/" in name]
    for name in names:
        path = name.split("/")[1:]
        label = "loss" if not path else path[0] if tasks.count(path[0]) == 1 else "/".join(path)
        parts.append(f"{label} {float(metrics[name]):.4g}")
    return ", ".join(parts)


def _short(value: float) -> str:
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.1f}{suffix}"
    return f"{value:.1f}"
