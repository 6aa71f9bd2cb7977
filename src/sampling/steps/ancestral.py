"""Ancestral sampling of any process: each step draws from its posterior (Ho et al. 2020; Austin et al. 2021)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from jaxtyping import Array

from src.interfaces import Process, PyTree
from src.sampling.steps.base import TimelineBase


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ancestral(TimelineBase):
    """x_s ~ p(x_s | x_t). Options: those of `TimelineBase`."""

    def step(
        self,
        process: Process,
        key: Array,
        estimate: PyTree,
        xt: PyTree,
        t: Array,
        s: Array,
        state: PyTree,
        again: Callable[[PyTree, Array], PyTree],
    ) -> tuple[PyTree, PyTree]:
        """One draw from the process's posterior."""
        return process.posterior(key, xt, estimate, t, s), state
