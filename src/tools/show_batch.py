"""Prints and draws the rows that a config's run begins with, as the model sees them.

python -m src.tools.show_batch --config=configs/digits.py --rows=4 --out=batch

For each task: the segments of its rows; of each row what lies under each name: the text, with [[targets]] in brackets,
its ids below it, with the same brackets, and where other tokens are; in `<out>/<task>.png` the images as the data
deliver them, as they come back from the codec, and noised as the network gets them; in `<out>/<task>-mask-<row>.png`
who sees whom: a line for each token, dark what it sees, colored by the part that is seen; `<task>-mask-<row>.txt` names
the part of each color.
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
from flax import nnx

from src.build import build_system
from src.common.files.store import write_whole
from src.common.rng import step_key
from src.common.tree import flatten
from src.data.pipeline.bad_rows import Ledger
from src.data.pipeline.stream import Mixture
from src.evals.grid import caption_grid, save_png
from src.interfaces import Batch, Layout, SequenceSpec, Tokens, View, row_of
from src.models.model import Network, bind
from src.sampling.raw_values import decoded
from src.sequence.mask import visible
from src.tools.datasets import debug_files, sources
from src.train.system import System, draw, prepare
from src.train.trainer import Trainer, check_data, make_trainer

CELL = 640  # pixels of a mask's side, about


def define() -> flags.FlagValues:
    """The flags."""
    values = sources.flags_of_config("The config whose data are shown.")
    common = {"flag_values": values}
    flags.DEFINE_string("task", None, "Only this task.", **common)
    flags.DEFINE_integer("rows", 4, "Rows of each task.", 1, 64, **common)
    flags.DEFINE_string("out", "batch", "The folder of the images.", **common)
    return values


@dataclasses.dataclass(frozen=True)
class Slots:
    """The slots of one row: the part that each belongs to, which are no padding, which are targets, and by name of the
    tokens the ids there, -1 where there is none."""

    parts: list[str]
    valid: np.ndarray
    target: np.ndarray
    ids: dict[str, np.ndarray]


def slots_of(layout: Layout, batch: Batch, row: int) -> Slots:
    """What each slot of a row holds; `batch` as the model sees it, behind the codecs."""

    def lay(values: Mapping[tuple[str, str], np.ndarray], fill: int) -> np.ndarray:
        return np.asarray(layout.join(batch, values, fill))[row]

    targets, ids = {}, {}
    for name, tokens in batch.tokens.items():
        valid, value = np.asarray(tokens.valid), np.asarray(tokens.value)
        targets[name, "clean"] = (np.asarray(tokens.target) & valid).astype(np.int32)
        targets[name, "noisy"] = targets[name, "clean"]
        if value.ndim == valid.ndim and np.issubdtype(value.dtype, np.integer):
            found = np.where(valid, value, -1)
            ids[name] = lay({(name, copy): found + 1 for copy in ("clean", "noisy")}, 0) - 1
    valid = np.asarray(layout.spec(batch).segment)[row] > 0
    ids = {name: np.where(valid, found, -1) for name, found in ids.items() if (found >= 0).any()}
    return Slots(_parts(layout, batch, row), valid, lay(targets, 0) > 0, ids)


def _parts(layout: Layout, batch: Batch, row: int) -> list[str]:
    """The name of the part that each slot of a row belongs to: a segment's, with the number of its part in rows that
    have several, and what is special about it."""
    labels, numbers = [""], {}
    for segment in layout.segments:
        rows, *several, length = np.shape(batch.tokens[segment.name].valid)
        special = {"clean": "", "noisy": " (noisy copy)" if segment.role == "copies" else "", "lead": " (lead)"}
        for copy, size in (("clean", length), ("noisy", length), ("lead", segment.lead)):
            if not size:
                continue
            counts = [f" {part + 1}" for part in range(several[0])] if several else [""]
            own = len(labels) + np.arange(len(counts))
            labels += [f"{', '.join(segment.names)}{count}{special[copy]}" for count in counts]
            numbers[segment.name, copy] = np.broadcast_to(own[:, None] if several else own, (rows, *several, size))
    return [labels[number] for number in np.asarray(layout.join(batch, numbers))[row]]


def described(slots: Slots, system: System) -> Iterator[str]:
    """A line for each run of slots of one part, and one of ids for each name that has some there."""
    starts = [i for i, part in enumerate(slots.parts) if not i or part != slots.parts[i - 1]]
    for start, end in zip(starts, [*starts[1:], len(slots.parts)], strict=True):
        here = slice(start, end)
        count, padding = int(slots.valid[here].sum()), int((~slots.valid[here]).sum())
        targets = int(slots.target[here].sum())
        names = [name for name, ids in slots.ids.items() if (ids[here] >= 0).any()]
        codecs = {name: system.fields[row_of(name)].codec.host for name in names}
        said = [words(slots.ids[n][here], slots.target[here], c) for n, c in codecs.items() if hasattr(c, "bos")]
        told = f"{count} token{'s' * (count != 1)}" + (f", {targets} of them targets" if targets else "")
        text = " | ".join(said) if said else told if count else ""
        yield f"{slots.parts[start]:>14}  {text}" + (f"  (+{padding} padding)" if padding else "")
        for name in names:
            yield f"{'ids':>14}  {numbers(slots.ids[name][here], slots.target[here])}"


def numbers(ids: np.ndarray, loss: np.ndarray) -> str:
    """Ids (-1 is left out), each run of targets in double brackets."""
    kept = [(str(i), bool(learned)) for i, learned in zip(ids.tolist(), loss.tolist(), strict=True) if i >= 0]
    runs = [(learned, " ".join(i for i, _ in run)) for learned, run in itertools.groupby(kept, lambda pair: pair[1])]
    return " ".join(f"[[{run}]]" if learned else run for learned, run in runs)


def words(ids: np.ndarray, loss: np.ndarray, codec: Any) -> str:
    """The text of ids (-1 is left out), special tokens by name, targets in double brackets."""
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


def mask_image(spec: SequenceSpec, row: int, parts: list[str]) -> np.ndarray:
    """Who sees whom in a row, `[height, width, 3]` uint8: a line for each query, a column for each key."""
    pick = lambda a: None if a is None else np.asarray(a[row] if np.ndim(a) > 1 else a)
    one = SequenceSpec(*(pick(getattr(spec, name)) for name in ("read", "write", "group", "segment", "position")))
    one = one if spec.relation is None else one.replace(relation=np.asarray(spec.relation[row]))
    seen = np.asarray(visible(one.replace(window=spec.window), one))
    palette = colors_of(parts)
    colors = np.array([palette[part] for part in parts], np.uint8)
    pixels = np.where(seen[..., None], colors[None], np.uint8(245))
    edges = [i for i in range(1, len(parts)) if parts[i] != parts[i - 1]]
    scale = max(1, CELL // len(parts))
    pixels = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    for edge in edges:
        pixels[edge * scale, :] = pixels[:, edge * scale] = 120
    return pixels


def colors_of(parts: list[str]) -> dict[str, tuple[int, int, int]]:
    """The color of each part of a mask, 0 to 255, in the order of the row."""
    names = list(dict.fromkeys(parts))
    hues = [colorsys.hsv_to_rgb(i / len(names), 0.9, 0.65) for i in range(len(names))]
    return {name: tuple(int(255 * value) for value in hue) for name, hue in zip(names, hues, strict=True)}


def legend(parts: list[str]) -> str:
    """A line for each part of a mask: its color, its name, and its first and last token, counted from 0."""
    lines = ["color    tokens       part"]
    for name, color in colors_of(parts).items():
        where = {i for i, part in enumerate(parts) if part == name}
        starts, ends = sorted(i for i in where if i - 1 not in where), sorted(i for i in where if i + 1 not in where)
        told = ", ".join(f"{a}-{b}" if a != b else f"{a}" for a, b in zip(starts, ends, strict=True))
        lines.append(f"#{bytes(color).hex()}  {told:<11}  {name or '(padding)'}")
    return "\n".join([*lines, "#f5f5f5  not seen", "#787878  edges between parts", ""])


def row_images(system: System, task: str, raw: Batch, ready: Batch, view: View) -> Iterator[tuple[str, np.ndarray]]:
    """(title, image `[h, w, C]` in [-1, 1]) of the images of some rows: delivered, decoded, noised.

    raw, ready   as the data deliver them, and as the step gets them; `view` as the network does
    """
    plan = system.tasks[task]
    for name, tokens in raw.tokens.items():
        field = system.fields[row_of(name)]
        if len(field.codec.delivered) != 3:
            continue
        own, grids = field.codec.host.where == "frozen", grids_of(tokens)
        values = _fold(tokens.value, 3)
        if values.shape[-1] in (1, 3):
            images = 2 * (values - values.min()) / max(np.ptp(values), 1e-6) - 1 if own else values
            images = map(plan.task.buckets.unfold, images, grids) if grids else images
            yield from ((f"{name} {i + 1}", image) for i, image in enumerate(images))
        if own or field.spec.vocab is not None:
            continue
        stages = {"decoded": view.batch.tokens[name].value} if field.codec.frozen is not None else {}
        stages |= {"noised": view.noisy[name]} if name in view.noisy else {}
        for title, value in stages.items():
            for i, image in enumerate(images_of(system, name, value, ready.tokens[name])):
                if image.shape[-1] in (1, 3):
                    yield f"{name} {i + 1}, {title}", np.clip(image, -1, 1)


def images_of(system: System, name: str, value: Any, tokens: Tokens) -> Any:
    """Images of patches `[…, N, P]`, `[h, w, C]` each, in the grids of their buckets if they have some."""
    flat = jax.tree.map(lambda a: np.asarray(a).reshape(-1, *np.shape(a)[np.ndim(tokens.valid) - 1 :]), tokens)
    frozen = lambda row, values: system.pipeline.frozen.decode(row, values, None)
    return decoded(system.fields[row_of(name)], _fold(value, 2), flat, frozen)


def grids_of(tokens: Tokens) -> list[tuple[int, int]]:
    """Rows and columns of each image of a bucket; empty without buckets."""
    if tokens.place is None:
        return []
    return list(map(tuple, (_fold(tokens.place, 2).max(axis=1) + 1).tolist()))


def _fold(a: Any, keep: int) -> np.ndarray:
    return np.asarray(a).reshape(-1, *np.shape(a)[-keep:])


def network_of(trainer: Trainer) -> Network:
    """A network for what objectives make of rows: without parameters, unless they need some."""
    architecture = trainer.system.architecture
    shapes = trainer.abstract.params
    objectives = [o for plan in trainer.system.tasks.values() for o, _ in plan.objectives.values()]
    learned = any(path.startswith("fields/") and "/codec/" in path for path in flatten(shapes))
    if learned or any(getattr(objective, "hint", 0) for objective in objectives):
        return bind(architecture, trainer.init_params())
    return Network(architecture, nnx.merge(architecture.graph, nnx.State(shapes)))


def run(values: flags.FlagValues, config: Any) -> None:
    """Shows what was asked for."""
    if config is None:
        raise ValueError("no config is given: add --config=configs/digits.py (or another file of configs/)")
    debug_files.fill_for(values)
    with config.unlocked():
        config.mesh.update({"data": 1, "fsdp": 1, "tensor": 1, "context": 1})
        config.accumulate = 1
    system = build_system(config)
    names = [values.task] if values.task else [*system.tasks]
    if unknown := [name for name in names if name not in system.tasks]:
        raise ValueError(f"there is no task {unknown[0]!r}; this config has {', '.join(system.tasks)}")
    plans = {name: dataclasses.replace(system.tasks[name], rows=values.rows) for name in names}
    system = dataclasses.replace(system, tasks=plans)
    check_data(system)
    trainer = make_trainer(system, jax.devices()[:1])
    rows, ledger = dict.fromkeys(plans, values.rows), Ledger(share=1)  # bad rows are shown, too
    data = Mixture({n: p.task for n, p in plans.items()}, rows, config.seed, ledger=ledger)
    raw = next(data)
    data.close()
    bad = {name: ledger.first(name) for name in names}
    for name in names:
        if not any(np.asarray(tokens.valid).any() for tokens in raw[name].tokens.values()):
            raise ValueError(f"task {name}: all {values.rows} rows are bad: {bad[name]}; mend them, or raise --rows")
    ready = jax.device_get(trainer.place(raw, 0))
    drawn = draw(system, ready, step_key(config.seed, 0))
    views, _ = prepare(system, network_of(trainer), drawn)
    for name in names:
        show(system, name, raw[name], ready[name], jax.device_get(views[name]), values)
        if bad[name]:
            print(f"  bad rows, which are shown without tokens: {bad[name]}")


def show(system: System, name: str, raw: Batch, ready: Batch, view: View, values: flags.FlagValues) -> None:
    """Prints and draws the rows of one task."""
    layout, batch = system.tasks[name].layout, view.batch
    parts = ", ".join(f"{', '.join(s.names)} ({_mode(s)})" for s in layout.segments)
    print(f"\n{name}: rows of {layout.length} tokens: {parts}")
    spec = jax.device_get(layout.spec(batch)).replace(window=system.config.model.trunk.get("sliding_window", 0))
    for row in range(values.rows):
        slots = slots_of(layout, batch, row)
        marked = {n: int((np.asarray(t.target) & np.asarray(t.valid))[row].sum()) for n, t in batch.tokens.items()}
        learned = ", ".join(f"{count} of {n}" for n, count in marked.items() if count)
        told = [f"{int(slots.valid.sum())} tokens", f"targets: {learned or 'none'}"]
        told += [f"{n} {np.asarray(value)[row].tolist()}" for n, value in batch.cond.items()]
        print(f"  row {row + 1}: {'; '.join(told)}")
        print("\n".join(f"    {line}" for line in described(slots, system)))
        path = os.path.join(values.out, f"{name}-mask-{row + 1}.png")
        save_png(path, mask_image(spec, row, slots.parts))
        write_whole(f"{path.removesuffix('.png')}.txt", legend(slots.parts).encode())
    found = list(row_images(system, name, raw, ready, view))
    for shape in dict.fromkeys(image.shape for _, image in found):
        titles, images = zip(*(pair for pair in found if pair[1].shape == shape), strict=True)
        stem = name if shape == found[0][1].shape else f"{name}-{shape[0]}x{shape[1]}x{shape[2]}"
        save_png(os.path.join(values.out, f"{stem}.png"), caption_grid(np.stack(images), titles, 8))
    print(f"  images in {values.out}/")


def _mode(segment: Any) -> str:
    """Length, role and blocks of a segment, and the tokens in front of it."""
    modes = {0: "bidirectional", 1: "causal"}
    blocks = segment.blocks if isinstance(segment.blocks, tuple) else modes.get(segment.blocks)
    lead = f", {segment.lead} in front" * bool(segment.lead)
    return f"{segment.length}, {segment.role}, {blocks or f'block:{segment.blocks}'}{lead}"


def main(argv: list[str]) -> int:
    """The exit code."""
    return sources.main(argv, define(), run)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
