"""Checks of a batch: is it what its task declares, and does anything learn from its tokens?"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from src.common.tree import flatten, listed
from src.doctor.context import Case, foretold, row_specs, row_valid
from src.doctor.diagnostic import Finding, error, note, warning
from src.interfaces import ImageField, LabelField, PlaceField, TokenField
from src.sequence.layout import Layout
from src.sequence.mask import visible
from src.sequence.packed import Document, placed

PADDED = 0.6  # share of padding that is worth a note
WIDEST, NARROWEST = 3.0, 0.05  # standard deviations of an image's values that the process can be meant for
PATTERNS = 64  # different patterns of padding that are looked at


def spec(case: Case) -> list[Finding]:
    """Trees, shapes and dtypes of the fields against `Task.element_spec`."""
    found = []
    declared = flatten(case.system.spec())
    real = flatten(dict(case.shapes))
    for path in sorted(declared.keys() | real.keys()):
        want, have = (f"{a.dtype} {tuple(a.shape)}" if a is not None else "nothing"
                      for a in (declared.get(path), real.get(path)))  # fmt: skip
        if want != have:
            task, _, field = path.partition("/")
            found.append(
                error(f"task {task} delivers {have} as {field} and declares {want}: make build and element_spec agree")
            )
    return found


def values(case: Case) -> list[Finding]:
    """Ids inside the vocabulary, labels inside the classes, images finite and about as large as the noise."""
    found = []
    for task, name, field in _fields(case):
        where = f"{name} of task {task}"
        if isinstance(field, TokenField):
            found += _between(field.ids, 0, case.system.codec.vocab_size - 1, f"token ids in {where}", "the vocabulary")
        elif isinstance(field, LabelField):
            most = case.system.tasks[task].task.classes
            found += _between(field.ids, 0, most, f"labels in {where}", f"the {most} classes and the one for none")
        else:
            images = field.values if field.valid is None else field.values[field.valid]
            found += _image(images, where, case.system.config.patch) if len(images) else []
    return found


def _between(ids: np.ndarray, least: int, most: int, what: str, of: str) -> list[Finding]:
    wrong = np.flatnonzero(((ids < least) | (ids > most)).reshape(len(ids), -1).any(1))
    if not wrong.size:
        return []
    return [
        error(f"{what} run from {ids.min()} to {ids.max()}, but {of} take {least} to {most} (rows {listed(wrong)} of"
              " the first batch): correct the data, or give the tokenizer and the classes that they were made with")
    ]  # fmt: skip


def _image(images: np.ndarray, where: str, patch: object) -> list[Finding]:
    spoilt = np.flatnonzero(~np.isfinite(images).reshape(len(images), -1).all(1))
    if spoilt.size:
        rows = f"{spoilt.size} of {len(images)} rows ({listed(spoilt)})"
        return [error(f"{where} has NaN or infinite values in {rows} of the first batch: clean the data")]
    scaled = (images.astype(np.float64) - patch.shift) * patch.scale
    low, high, spread = scaled.min(), scaled.max(), scaled.std()
    told = f"{where} has values from {low:.3g} to {high:.3g}, standard deviation {spread:.3g}"
    if not NARROWEST <= spread <= WIDEST:
        return [warning(f"{told}, and the noise has 1: scale them to about [-1, 1] (patch.scale, patch.shift)")]
    if low >= 0:
        return [warning(f"{told}, none below 0: shift them to be even about 0 (pixels · 2 - 1, or patch.shift)")]
    return []


def flags(case: Case) -> list[Finding]:
    """`loss` marks only tokens that exist, and only such as an objective reads and can predict."""
    found = []
    for task, name, field in _fields(case):
        if not isinstance(field, TokenField):
            continue
        plan = case.system.tasks[task]
        where, marked = f"{name} of task {task}", field.loss & field.valid
        padded = int((field.loss & ~field.valid).sum())
        if padded:
            found.append(warning(f"{padded} places of {where} are marked for loss, but are padding: mark tokens only"))
        readers = [label for label, (objective, _) in plan.objectives.items() if name in objective.fields]
        if marked.any() and not readers:
            found.append(
                warning(
                    f"{marked.sum()} tokens in {where} are marked for loss, but no objective of the task has the"
                    f" field: add {name!r} to the fields of one, or do not mark them"
                )
            )
            continue
        if readers and not marked.any():
            found.append(
                warning(
                    f"objective {listed(readers)} has the field {where}, but no token there is marked for loss in the"
                    " first batch: mark them in the data, or leave the field out"
                )
            )
        lost = int((marked & ~foretold(plan.layout, case.batch[task], name)).sum())
        if lost:
            found.append(
                warning(
                    f"{lost} tokens in {where} are marked for loss, but come first or after padding, where nothing"
                    " predicts them: begin with a token such as <s>, and pad behind the text"
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
        for row, rule in row_specs(plan.layout, case.batch[task], PATTERNS):
            places = np.flatnonzero(row & ~visible(rule, rule).any(-1))
            if places.size:
                names = _holding(plan.layout, places)
                found.append(
                    error(
                        f"{places.size} tokens of a row of task {task} (in {listed(names)}) may see no token, not even"
                        " themselves: correct the orders of the layout"
                    )
                )
                break
    return found


def _holding(layout: Layout, places: np.ndarray) -> list[str]:
    """Names of the segments that some of these places lie in."""
    if isinstance(layout, Document):
        return [f"slots {listed(places)}"]
    return [n for n, s in layout.slices().items() if ((places >= s.start) & (places < s.stop)).any()]


def padding(case: Case) -> list[Finding]:
    """Tasks whose rows are mostly padding."""
    found = []
    for task, plan in case.system.tasks.items():
        share = 1 - row_valid(plan.layout, case.batch[task]).mean()
        if share > PADDED:
            found.append(note(f"{share:.0%} of task {task} is padding: a shorter length would be as good and faster"))
    return found


def vacant(case: Case) -> list[Finding]:
    """Packed rows whose places for images are mostly empty: each of them costs what an image costs."""
    found = []
    for task, plan in case.system.tasks.items():
        if not isinstance(plan.layout, Document):
            continue
        for name, begins in placed(plan.layout, case.batch[task])[0].begins.items():
            there = np.asarray(begins) >= 0
            if not there.any():
                found.append(
                    warning(
                        f"no row of the first batch of task {task} has one of its {there.shape[1]} images in {name}:"
                        " say in the config that there are none, or look at the documents"
                    )
                )
            elif 1 - there.mean() > PADDED:
                found.append(
                    note(
                        f"{1 - there.mean():.0%} of the {there.shape[1]} images that a row of task {task} may have in"
                        f" {name} are not there: fewer would be as good and faster"
                    )
                )
    return found


def given(case: Case) -> list[Finding]:
    """Fields that are read and never predicted, which is right for prompts."""
    found = []
    for task, plan in case.system.tasks.items():
        owned = {name for objective, _ in plan.objectives.values() for name in objective.fields}
        aside = (LabelField, PlaceField)
        names = [n for n, f in case.batch[task].items() if n not in owned and not isinstance(f, aside)]
        if names:
            found.append(note(f"task {task} reads {listed(names)} and predicts {listed(sorted(owned))}"))
    return found


def _fields(case: Case) -> Iterator[tuple[str, str, TokenField | ImageField | LabelField]]:
    for task, fields in case.batch.items():
        for name, field in fields.items():
            if not isinstance(field, PlaceField):
                yield task, name, field
