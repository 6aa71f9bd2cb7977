"""Checks of a batch: is it what its task declares, and does anything learn from its tokens?"""

from __future__ import annotations

from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from src.common.tree import flatten, listed
from src.doctor.context import Case, foretold, row_specs, row_valid, segments_of
from src.doctor.diagnostic import Finding, error, note, warning
from src.interfaces import Field, Tokens, row_of
from src.sequence.mask import visible

PADDED = 0.6  # share of padding that is worth a note
WIDEST, NARROWEST = 3.0, 0.05  # standard deviations of values that the process can be meant for
PATTERNS = 64  # different patterns of padding that are looked at


def spec(case: Case) -> list[Finding]:
    """Trees, shapes and dtypes of the batch against `Task.element_spec`."""
    found = []
    declared = flatten(case.system.spec())
    real = flatten(dict(case.shapes))
    for path in sorted(declared.keys() | real.keys()):
        want, have = (f"{a.dtype} {tuple(a.shape)}" if a is not None else "nothing"
                      for a in (declared.get(path), real.get(path)))  # fmt: skip
        if want != have:
            task, _, array = path.partition("/")
            found.append(
                error(
                    f"task {task} delivers {have} as {array.removeprefix('tokens/')} and declares {want}: make build"
                    " and element_spec agree"
                )
            )
    return found


def values(case: Case) -> list[Finding]:
    """Ids inside the vocabulary, classes that there are, other numbers finite and about as large as the noise."""
    found = []
    for task, name, tokens in _tokens(case):
        field, where = case.system.fields[row_of(name)], f"{name} of task {task}"
        there = np.asarray(tokens.value)[np.asarray(tokens.valid).any(-1)]
        found += _tokens_of(field, there, where) if len(there) else []
    for task, batch in case.batch.items():
        for name, value in batch.cond.items():
            value, where = np.asarray(value), f"{name} of task {task}"
            most = case.system.fields[name].spec.vocab
            if most is None:
                found += _finite(value, where)
            else:
                found += _between(value, 0, most, f"labels in {where}", f"the {most} classes and the one for none")
    return found


def _tokens_of(field: Field, value: np.ndarray, where: str) -> list[Finding]:
    """Of the values of some rows, or of some parts of rows, as the data give them."""
    spoilt = _finite(value, where)
    if spoilt:
        return spoilt
    value = np.asarray(field.codec.encode(jnp.asarray(value)))
    if field.spec.vocab is not None:
        return _between(value, 0, field.spec.vocab - 1, f"token ids in {where}", "the vocabulary")
    return _spread(value, where, f"fields.{field.name}.codec")


def _between(ids: np.ndarray, least: int, most: int, what: str, of: str) -> list[Finding]:
    wrong = np.flatnonzero(((ids < least) | (ids > most)).reshape(len(ids), -1).any(1))
    if not wrong.size:
        return []
    return [
        error(f"{what} run from {ids.min()} to {ids.max()}, but {of} take {least} to {most} (rows {listed(wrong)} of"
              " the first batch): correct the data, or give the tokenizer and the classes that they were made with")
    ]  # fmt: skip


def _finite(value: np.ndarray, where: str) -> list[Finding]:
    spoilt = np.flatnonzero(~np.isfinite(value).reshape(len(value), -1).all(1))
    if not spoilt.size:
        return []
    rows = f"{spoilt.size} of {len(value)} rows ({listed(spoilt)})"
    return [error(f"{where} has NaN or infinite values in {rows} of the first batch: clean the data")]


def _spread(tokens: np.ndarray, where: str, codec: str) -> list[Finding]:
    tokens = tokens.astype(np.float64)
    low, high, spread = tokens.min(), tokens.max(), tokens.std()
    told = f"{where} has values from {low:.3g} to {high:.3g}, standard deviation {spread:.3g}"
    if not NARROWEST <= spread <= WIDEST:
        return [warning(f"{told}, and the noise has 1: scale them to about [-1, 1] (scale and shift of {codec})")]
    if low >= 0:
        return [warning(f"{told}, none below 0: shift them to be even about 0 (pixels · 2 - 1, or shift of {codec})")]
    return []


def targets(case: Case) -> list[Finding]:
    """Targets are only tokens that exist, and only such as an objective reads and can predict."""
    found = []
    for task, name, tokens in _tokens(case):
        plan, where = case.system.tasks[task], f"{name} of task {task}"
        target, valid = np.asarray(tokens.target), np.asarray(tokens.valid)
        marked, padded = target & valid, int((target & ~valid).sum())
        if padded:
            found.append(warning(f"{padded} places of {where} are targets, but are padding: mark tokens only"))
        readers = {label: objective for label, (objective, _) in plan.objectives.items() if name in objective.names}
        if marked.any() and not readers:
            found.append(
                warning(
                    f"{marked.sum()} tokens in {where} are targets, but no objective of the task has the name: add"
                    f" {name!r} to the names of one (tasks.{task}.objectives), or do not mark them"
                )
            )
        if readers and valid.any() and not marked.any():
            found.append(
                warning(
                    f"objective {listed(list(readers))} has the name {where}, but no token there is a target in the"
                    " first batch: mark them in the data, or leave the name out"
                )
            )
        if not any(getattr(objective, "predicts_next", False) for objective in readers.values()):
            continue
        lost = int((marked & ~foretold(plan.layout, case.batch[task], name)).sum())
        if lost:
            found.append(
                warning(
                    f"{lost} tokens in {where} are targets, but come first or after padding, where nothing predicts"
                    " them: begin with a token such as <s>, and pad behind the text"
                )
            )
    return found


def blind(case: Case) -> list[Finding]:
    """Masks with empty rows: a token that may see none, by the one visibility rule, for the rows of the batch."""
    found = []
    for task, plan in case.system.tasks.items():
        valid = row_valid(plan.layout, case.batch[task])
        empty = int((~valid.any(1)).sum())
        if empty:
            found.append(warning(f"{empty} of {len(valid)} rows of task {task} have no token: leave them out"))
        for row, there, rule in row_specs(plan.layout, case.batch[task], PATTERNS):
            places = np.flatnonzero(there & ~visible(rule, rule).any(-1))
            if places.size:
                numbers = np.unique(segments_of(plan.layout, case.batch[task])[row, places])
                names = [", ".join(plan.layout.segments[number - 1].names) for number in numbers if number]
                found.append(
                    error(
                        f"{places.size} tokens of a row of task {task} (in {listed(names)}) may see no token, not even"
                        " themselves: correct the orders of the layout"
                    )
                )
                break
    return found


def padding(case: Case) -> list[Finding]:
    """Tasks whose rows are mostly padding."""
    found = []
    for task, plan in case.system.tasks.items():
        share = 1 - row_valid(plan.layout, case.batch[task]).mean()
        if share > PADDED:
            found.append(note(f"{share:.0%} of task {task} is padding: a shorter length would be as good and faster"))
    return found


def vacant(case: Case) -> list[Finding]:
    """Packed rows whose places for parts are mostly empty: each of them costs what a part costs."""
    found = []
    for task, batch in case.batch.items():
        for name in batch.packing.begins if batch.packing is not None else ():
            there = np.asarray(batch.tokens[name].valid).any(-1)
            if not there.any():
                found.append(
                    warning(
                        f"no row of the first batch of task {task} has one of its {there.shape[1]} parts of {name}:"
                        f" say in tasks.{task}.template that there are none, or look at the data"
                    )
                )
            elif 1 - there.mean() > PADDED:
                found.append(
                    note(
                        f"{1 - there.mean():.0%} of the {there.shape[1]} parts that a row of task {task} may have of"
                        f" {name} are not there: fewer would be as good and faster"
                    )
                )
    return found


def given(case: Case) -> list[Finding]:
    """Names that are read and never predicted, which is right for prompts."""
    found = []
    for task, plan in case.system.tasks.items():
        owned = {name for objective, _ in plan.objectives.values() for name in objective.names}
        names = [name for name in case.batch[task].tokens if name not in owned]
        if names:
            found.append(note(f"task {task} reads {listed(names)} and predicts {listed(sorted(owned))}"))
    return found


def _tokens(case: Case) -> Iterator[tuple[str, str, Tokens]]:
    for task, batch in case.batch.items():
        for name, tokens in batch.tokens.items():
            yield task, name, tokens
