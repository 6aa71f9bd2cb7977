"""Checks of the first batch: shapes and dtypes, values, targets, masks and padding."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from src.codecs.chain import encode_compiled
from src.common.tree import flatten, listed
from src.doctor.context import CheckContext, row_specs, segment_numbers
from src.doctor.diagnostic import Diagnostic, error, note, warning
from src.interfaces import Field, Tokens, row_of
from src.sequence.mask import visible

PADDED = 0.6  # share of padding above which there is a note
WIDEST, NARROWEST = 3.0, 0.05  # accepted standard deviations of values to be noised
PATTERNS = 64  # rows of different padding whose masks are checked


def spec(context: CheckContext) -> list[Diagnostic]:
    """Trees, shapes and dtypes of the batch against `Task.element_spec`."""
    found = []
    declared = flatten(context.system.spec())
    real = flatten(dict(context.shapes))
    for path in sorted(declared.keys() | real.keys()):
        want, have = (f"{a.dtype} {tuple(a.shape)}" if a is not None else "nothing"
                      for a in (declared.get(path), real.get(path)))  # fmt: skip
        if want != have:
            task, _, array = path.partition("/")
            found.append(
                error(
                    f"task {task} delivers {have} as {array.removeprefix('tokens/')}, but declares {want}: make build"
                    " and element_spec agree"
                )
            )
    return found


def values(context: CheckContext) -> list[Diagnostic]:
    """Token ids outside the vocabulary, labels outside the classes, values not finite or far from the noise's scale."""
    found = []
    for task, name, tokens in _tokens(context):
        field, where = context.system.fields[row_of(name)], f"{name} of task {task}"
        there = np.asarray(tokens.value)[np.asarray(tokens.valid).any(-1)]
        found += _tokens_of(field, there, where) if len(there) else []
    for task, batch in context.batch.items():
        for name, value in batch.cond.items():
            value, where = np.asarray(value), f"{name} of task {task}"
            most = context.system.fields[name].spec.vocab
            if most is None:
                found += _finite(value, where)
            else:
                found += _between(value, 0, most, f"labels in {where}", f"the {most} classes and the null class")
    return found


def _tokens_of(field: Field, value: np.ndarray, where: str) -> list[Diagnostic]:
    """Checks raw values of a field, `[rows, …]`."""
    bad = _finite(value, where)
    if bad:
        return bad
    value = np.asarray(encode_compiled(field.codec, value)) if field.codec.device else value
    if field.spec.vocab is not None:
        return _between(value, 0, field.spec.vocab - 1, f"token ids in {where}", "the vocabulary")
    return _spread(value, where, f"fields.{field.name}.codec")


def _between(ids: np.ndarray, least: int, most: int, what: str, of: str) -> list[Diagnostic]:
    wrong = np.flatnonzero(((ids < least) | (ids > most)).reshape(len(ids), -1).any(1))
    if not wrong.size:
        return []
    return [
        error(f"{what} run from {ids.min()} to {ids.max()}, but {of} allow {least} to {most} (rows {listed(wrong)} of"
              " the first batch): correct the data, or set the tokenizer or the classes that they were made with")
    ]  # fmt: skip


def _finite(value: np.ndarray, where: str) -> list[Diagnostic]:
    bad = np.flatnonzero(~np.isfinite(value).reshape(len(value), -1).all(1))
    if not bad.size:
        return []
    rows = f"{bad.size} of {len(value)} rows ({listed(bad)})"
    return [error(f"{where} has NaN or infinite values in {rows} of the first batch: clean the data")]


def _spread(tokens: np.ndarray, where: str, codec: str) -> list[Diagnostic]:
    tokens = tokens.astype(np.float64)
    low, high, spread = tokens.min(), tokens.max(), tokens.std()
    text = f"{where} has values from {low:.3g} to {high:.3g}, standard deviation {spread:.3g}"
    if not NARROWEST <= spread <= WIDEST:
        return [warning(f"{text}, and the noise has 1: scale them to about [-1, 1] (scale and shift of {codec})")]
    if low >= 0:
        return [warning(f"{text}, none below 0: center them on 0 (pixels · 2 - 1, or shift of {codec})")]
    return []


def targets(context: CheckContext) -> list[Diagnostic]:
    """Targets that are padding, that no objective reads, or that no token precedes; objectives without targets."""
    found = []
    for task, name, tokens in _tokens(context):
        plan, where = context.system.tasks[task], f"{name} of task {task}"
        target, valid = np.asarray(tokens.target), np.asarray(tokens.valid)
        marked, padded = target & valid, int((target & ~valid).sum())
        if padded:
            found.append(warning(f"{padded} positions of {where} are targets, but are padding: mark tokens only"))
        readers = {label: objective for label, (objective, _) in plan.objectives.items() if name in objective.names}
        if marked.any() and not readers:
            found.append(
                warning(
                    f"{marked.sum()} tokens in {where} are targets, but no objective of the task reads them: add"
                    f" {name!r} to the names of one (tasks.{task}.objectives), or do not mark them as targets"
                )
            )
        if readers and valid.any() and not marked.any():
            found.append(
                warning(
                    f"objective {listed(list(readers))} has the name {where}, but no token there is a target in the"
                    " first batch: mark targets in the data, or remove the name"
                )
            )
        if not any(getattr(objective, "predicts_next", False) for objective in readers.values()):
            continue
        lost = int((marked & ~context.has_predictor(task, name)).sum())
        if lost:
            found.append(
                warning(
                    f"{lost} tokens in {where} are targets, but come first or after padding, where no token predicts"
                    " them: begin with a token such as <s>, and pad after the text"
                )
            )
    return found


def empty_attention(context: CheckContext) -> list[Diagnostic]:
    """Rows without a token, and tokens whose row of the attention mask is empty."""
    found = []
    for task, plan in context.system.tasks.items():
        valid = context.valid(task)
        empty = int((~valid.any(1)).sum())
        if 0 < empty < len(valid):  # of a batch of bad rows alone something else is said
            found.append(warning(f"{empty} of {len(valid)} rows of task {task} have no token: remove them"))
        for row, there, rule in row_specs(context.spec(task), PATTERNS):
            places = np.flatnonzero(there & ~visible(rule, rule).any(-1))
            if places.size:
                numbers = np.unique(segment_numbers(plan.layout, context.batch[task])[row, places])
                names = [", ".join(plan.layout.segments[number - 1].names) for number in numbers if number]
                found.append(
                    error(
                        f"{places.size} tokens of a row of task {task} (in {listed(names)}) may see no token, not even"
                        " themselves: correct the read and write orders of the layout"
                    )
                )
                break
    return found


def bad_batches(context: CheckContext) -> list[str]:
    """Tasks none of whose rows has a token: all of them are bad."""
    tokens = {task: batch.tokens.values() for task, batch in context.batch.items()}
    return [task for task, each in tokens.items() if not any(np.asarray(t.valid).any() for t in each)]


def padding(context: CheckContext) -> list[Diagnostic]:
    """Tasks whose rows are mostly padding."""
    found = []
    for task in context.system.tasks:
        share = 1 - context.valid(task).mean()
        if PADDED < share < 1:
            found.append(note(f"{share:.0%} of task {task} is padding: a shorter length may be as good and is faster"))
    return found


def unused_parts(context: CheckContext) -> list[Diagnostic]:
    """Packed rows with many unused parts, which cost as much as used ones."""
    found = []
    for task, batch in context.batch.items():
        for name in batch.packing.begins if batch.packing is not None else ():
            there = np.asarray(batch.tokens[name].valid).any(-1)
            if not there.any():
                found.append(
                    warning(
                        f"no row of the first batch of task {task} uses any of its {there.shape[1]} parts of {name}:"
                        f" set their number to 0 in tasks.{task}.template, or correct the data"
                    )
                )
            elif 1 - there.mean() > PADDED:
                found.append(
                    note(
                        f"{1 - there.mean():.0%} of the {there.shape[1]} parts of {name} in each row of task {task}"
                        " are unused: fewer are faster"
                    )
                )
    return found


def unpredicted_names(context: CheckContext) -> list[Diagnostic]:
    """Names that are read and never predicted, as prompts are."""
    found = []
    for task, plan in context.system.tasks.items():
        owned = {name for objective, _ in plan.objectives.values() for name in objective.names}
        names = [name for name in context.batch[task].tokens if name not in owned]
        if names:
            found.append(note(f"task {task} reads {listed(names)} and predicts {listed(sorted(owned))}"))
    return found


def _tokens(context: CheckContext) -> Iterator[tuple[str, str, Tokens]]:
    for task, batch in context.batch.items():
        for name, tokens in batch.tokens.items():
            yield task, name, tokens
