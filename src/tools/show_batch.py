"""Prints and draws the rows that a config's run begins with, as the model sees them.

python -m src.tools.show_batch --config=configs/digits.py --rows=4 --out=batch

For each task: the segments of its rows; of each row the text, with [[what is learned]] in brackets, its ids below it,
with the same brackets, and where its images are; in `<out>/<task>.png` the images as the data deliver them, as they
come back from the codec, and noised as the network gets them; in `<out>/<task>-mask-<row>.png` who sees whom: a line
for each token, dark what it sees, colored by the part that is seen.
"""

from __future__ import annotations

import colorsys
import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a few rows

import jax
import numpy as np
from absl import flags

from src.build import build_system
from src.common.rng import step_key
from src.data.pipeline.stream import Mixture
from src.doctor.context import row_valid
from src.evals.grid import caption_grid, save_png
from src.interfaces import Batch, BucketField, ImageField, LabelField, SequenceSpec, TokenField
from src.sequence.layout import Layout
from src.sequence.mask import visible
from src.sequence.packed import Document, placed
from src.tools.datasets import sources
from src.train.system import System, prepare
from src.train.trainer import make_trainer

CELL = 640  # pixels of a mask's side, about
Shown = Mapping[str, Mapping[str, Batch]]


def define() -> flags.FlagValues:
    """The flags."""
    values = sources.flags_of_config("The config whose data are shown.")
    common = {"flag_values": values}
    flags.DEFINE_string("task", None, "Only this task.", **common)
    flags.DEFINE_integer("rows", 4, "Rows of each task.", 1, 64, **common)
    flags.DEFINE_string("out", "batch", "The folder of the pictures.", **common)
    return values


@dataclasses.dataclass(frozen=True)
class Slots:
    """The slots of one row: ids (-1: no text), which are no padding, which are learned, and the part they belong to."""

    ids: np.ndarray
    valid: np.ndarray
    loss: np.ndarray
    parts: list[str]


def slots_of(layout: Layout, batch: Batch, row: int) -> Slots:
    """What each slot of a row holds."""
    ids, loss = np.full(layout.length, -1), np.zeros(layout.length, bool)
    valid = row_valid(layout, batch)[row]
    if isinstance(layout, Document):
        text, parts = batch[layout.text], [layout.text] * layout.length
        ids, loss = np.asarray(text.ids[row]).copy(), np.asarray(text.loss[row])
        places, _ = placed(layout, batch)
        for segment in layout.images:
            for kind in ("patches", "time")[: 1 + layout.time]:
                owner = np.asarray(layout.owner(places, segment.name, kind)[0][row])
                for slot in np.flatnonzero(owner >= 0):
                    parts[slot] = f"{segment.name} {owner[slot] + 1}" + (" (time)" if kind == "time" else "")
                    ids[slot] = -1
        return Slots(np.where(valid, ids, -1), valid, loss & valid, parts)
    for name, where in layout.slices().items():
        if isinstance(field := batch.get(name), TokenField):
            ids[where], loss[where] = np.where(field.valid[row], field.ids[row], -1), (field.loss & field.valid)[row]
    return Slots(ids, valid, loss, [s.name for s in layout.segments for _ in range(s.length)])


def described(slots: Slots, codec: Any) -> Iterator[str]:
    """A line for each run of slots of one part, and one of ids for texts."""
    starts = [i for i, part in enumerate(slots.parts) if not i or part != slots.parts[i - 1]]
    for start, end in zip(starts, [*starts[1:], len(slots.parts)], strict=True):
        here = slice(start, end)
        padding = int((~slots.valid[here]).sum())
        said = words(slots.ids[here], slots.loss[here], codec) if (slots.ids[here] >= 0).any() else ""
        said = said or (
            f"{end - start - padding} token{'s' * (end - start - padding != 1)}" if padding < end - start else ""
        )
        yield f"{slots.parts[start]:>12}  {said}" + (f"  (+{padding} padding)" if padding else "")
        if (slots.ids[here] >= 0).any():
            yield f"{'ids':>12}  {numbers(slots.ids[here], slots.loss[here])}"


def numbers(ids: np.ndarray, loss: np.ndarray) -> str:
    """Ids (-1 is left out), each run of learned ones in double brackets."""
    kept = [(str(i), bool(learned)) for i, learned in zip(ids.tolist(), loss.tolist(), strict=True) if i >= 0]
    runs = [(learned, " ".join(i for i, _ in run)) for learned, run in itertools.groupby(kept, lambda pair: pair[1])]
    return " ".join(f"[[{run}]]" if learned else run for learned, run in runs)


def words(ids: np.ndarray, loss: np.ndarray, codec: Any) -> str:
    """The text of ids (-1 is left out), special tokens by name, what is learned in double brackets."""
    special = {codec.pad: "<PAD>", codec.image: "<image>", codec.image_start: "<|im_start|>",
               codec.image_end: "<|im_end|>", codec.bos: "<s>", codec.eos: "</s>"}  # fmt: skip
    pieces: list[tuple[bool, str]] = []
    run: list[int] = []

    def flush(learned: bool) -> None:
        if run:
            pieces.append((learned, codec.decode(run)))
            run.clear()

    before = False
    for index, learned in zip(ids.tolist(), loss.tolist(), strict=True):
        if learned != before or index in special or index < 0:
            flush(before)
        before = learned
        if index in special:
            pieces.append((learned, special[index]))
        elif index >= 0:
            run.append(index)
    flush(before)
    out = ""
    for place, (learned, text) in enumerate(pieces):
        opened = learned and not (place and pieces[place - 1][0])
        closed = learned and not (place + 1 < len(pieces) and pieces[place + 1][0])
        out += f"{' ' if out else ''}{'[[' if opened else ''}{text}{']]' if closed else ''}"
    return out


def mask_picture(spec: SequenceSpec, row: int, parts: list[str]) -> np.ndarray:
    """Who sees whom in a row, `[height, width, 3]` uint8: a line for each query, a column for each key."""
    pick = lambda a: None if a is None else np.asarray(a[row] if np.ndim(a) > 1 else a)
    one = SequenceSpec(*(pick(getattr(spec, name)) for name in ("read", "write", "group", "segment", "position")))
    seen = np.asarray(visible(one, one))
    names = list(dict.fromkeys(parts))
    hues = np.array([colorsys.hsv_to_rgb(i / len(names), 0.9, 0.65) for i in range(len(names))])
    colors = (255 * hues[[names.index(part) for part in parts]]).astype(np.uint8)
    pixels = np.where(seen[..., None], colors[None], np.uint8(245))
    edges = [i for i in range(1, len(parts)) if parts[i] != parts[i - 1]]
    scale = max(1, CELL // len(parts))
    pixels = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    for edge in edges:
        pixels[edge * scale, :] = pixels[:, edge * scale] = 120
    return pixels


def pictures(system: System, name: str, raw: Batch, ready: Batch, view: Any, rows: int) -> Iterator[tuple[str, Any]]:
    """(title, image `[h, w, C]` in [-1, 1]) of the images of some rows: delivered, decoded, noised."""
    layout, predict = system.tasks[name].layout, system.predictor
    for field, values in ((s.name, raw[s.name].values) for s in layout.segments if s.kind in ("image", "vision")):
        kind, grids = layout.segment(field).kind, grids_of(raw[field], system.tasks[name].task)
        if values.shape[-1] in (1, 3):
            flat = np.asarray(values).reshape(-1, *values.shape[-3:])
            flat = flat if kind == "image" else 2 * (flat - flat.min()) / max(np.ptp(flat), 1e-6) - 1
            if grids:
                flat = map(system.tasks[name].task.buckets.unfold, flat, grids)
            yield from ((f"{field} {i + 1}", image) for i, image in enumerate(flat))
        if kind == "vision":
            continue
        shown = {"decoded": predict.encode(jax.numpy.asarray(_fold(ready[field].values, 3)))}
        if field in view.times:
            shown["noised"] = _fold(view.inputs[field], 2)
        for title, patches in shown.items():
            if title == "decoded" and system.frozen.image is None:
                continue  # it is what was delivered
            for i, image in enumerate(decoded(predict, jax.numpy.asarray(patches), grids)):
                if image.shape[-1] in (1, 3):
                    yield f"{field} {i + 1}, {title}", np.clip(image, -1, 1)


def decoded(predict: Any, patches: Any, grids: list[tuple[int, int]]) -> list[np.ndarray]:
    """Pictures of patches `[n, N, P]`, `[h, w, C]` each, in the grids of their buckets if they have some."""
    if not grids:
        return list(np.asarray(predict.pictures(np.asarray(predict.decode(patches)))))
    out: dict[int, np.ndarray] = {}
    for grid in dict.fromkeys(grids):
        chosen = [i for i, own in enumerate(grids) if own == grid]
        images = predict.pictures(np.asarray(predict.shaped(grid)(patches[np.asarray(chosen)])))
        out |= dict(zip(chosen, images, strict=True))
    return [out[i] for i in range(len(grids))]


def grids_of(field: ImageField, task: Any) -> list[tuple[int, int]]:
    """Rows and columns of each image of a bucket, the first bucket's in a row that was refused; empty without
    buckets."""
    if not isinstance(field, BucketField):
        return []
    grids = map(tuple, np.asarray(field.grid).reshape(-1, 2).tolist())
    return [grid if all(grid) else task.buckets.grids[0] for grid in grids]


def _fold(a: Any, keep: int) -> np.ndarray:
    return np.asarray(a).reshape(-1, *np.shape(a)[-keep:])


def run(values: flags.FlagValues, config: Any) -> None:
    """Shows what was asked for."""
    if config is None:
        raise ValueError("no config is given: add --config=configs/digits.py (or another file of configs/)")
    with config.unlocked():
        config.mesh.update({"data": 1, "fsdp": 1, "tensor": 1, "context": 1})
        config.accumulate = 1
    system = build_system(config)
    names = [values.task] if values.task else [*system.tasks]
    if unknown := [name for name in names if name not in system.tasks]:
        raise ValueError(f"there is no task {unknown[0]!r}; this config has {', '.join(system.tasks)}")
    plans = {name: dataclasses.replace(system.tasks[name], rows=values.rows) for name in names}
    system = dataclasses.replace(system, tasks=plans)
    trainer = make_trainer(system, jax.devices()[:1])
    for name, plan in plans.items():
        system.frozen.check(name, getattr(plan.task, "latents_of", None))
    data = Mixture({n: p.task for n, p in plans.items()}, dict.fromkeys(plans, values.rows), config.seed)
    raw = next(data)
    data.close()
    ready = jax.device_get(trainer.place(raw, 0))
    views, _ = jax.jit(lambda batch: prepare(system, batch, step_key(config.seed, 0), True))(ready)
    for name in names:
        show(system, name, raw[name], ready[name], jax.device_get(views[name]), values)


def show(system: System, name: str, raw: Batch, ready: Batch, view: Any, values: flags.FlagValues) -> None:
    """Prints and draws the rows of one task."""
    layout, rows = system.tasks[name].layout, values.rows
    parts = ", ".join(f"{s.name} ({s.kind}, {s.length}, {s.mode})" for s in layout.segments)
    print(f"\n{name}: rows of {layout.length} tokens: {parts}")
    owned = {field for objective, _ in system.tasks[name].objectives.values() for field in objective.fields}
    drawn = [s.name for s in layout.segments if s.kind == "image" and s.name in owned]
    valid = row_valid(layout, ready)
    spec = jax.device_get(
        layout.spec_of(jax.numpy.asarray(valid), placed(layout, ready)[0])
        if isinstance(layout, Document)
        else layout.spec(jax.numpy.asarray(valid))
    )
    for row in range(rows):
        slots = slots_of(layout, ready, row)
        labels = [f"class {f.ids[row]}" for f in ready.values() if isinstance(f, LabelField)]
        learned = [f"{int(slots.loss.sum())} of text"] * bool(slots.loss.any()) + drawn
        told = [f"{int(valid[row].sum())} tokens", f"learned: {', '.join(learned) or 'nothing'}", *labels]
        print(f"  row {row + 1}: {'; '.join(told)}")
        print("\n".join(f"    {line}" for line in described(slots, system.codec)))
        path = os.path.join(values.out, f"{name}-mask-{row + 1}.png")
        save_png(path, mask_picture(spec, row, slots.parts))
    if any(isinstance(field, ImageField) for field in raw.values()):
        found = list(pictures(system, name, raw, ready, view, rows))
        if found:
            titles, images = zip(*found, strict=True)
            for shape in dict.fromkeys(image.shape for image in images):
                chosen = [i for i, image in enumerate(images) if image.shape == shape]
                stem = name if shape == images[0].shape else f"{name}-{shape[0]}x{shape[1]}x{shape[2]}"
                page = caption_grid(np.stack([images[i] for i in chosen]), [titles[i] for i in chosen], 8)
                save_png(os.path.join(values.out, f"{stem}.png"), page)
    print(f"  pictures in {values.out}/")


def main(argv: list[str]) -> int:
    """The exit code."""
    return sources.main(argv, define(), run)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
