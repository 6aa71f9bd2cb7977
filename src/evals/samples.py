"""The files of `--mode=sample`: a grid, single images, an array, sounds, and JSON that says what each of them is."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from src.codecs.pixels import scaled
from src.common.files.paths import stem
from src.common.files.store import write_named

FORMATS = ("grid", "png", "npy", "json")
COLUMNS = 8


def formats_of(asked: Sequence[str] | None, images: bool, task: str) -> list[str]:
    """What is written: `asked` (of --format), or grid and json, for a task that makes `images` or not.

    Raises ValueError for a format that there is not, and for one that keeps nothing of what the task makes.
    """
    if asked is None:
        return ["grid", "json"] if images else ["json"]
    told = f"--format={','.join(asked)}"
    if wrong := [each for each in asked if each not in FORMATS]:
        raise ValueError(f"{told} has {wrong[0]!r}; give some of {', '.join(FORMATS)}, with commas between them")
    if images and not set(asked) - {"json"}:
        raise ValueError(f"{told} keeps no image, which task {task} makes: add grid, png or npy")
    if wrong := [each for each in asked if each != "json" and not images]:
        raise ValueError(f"{told}: {wrong[0]} is for images, and task {task} makes none: give json")
    return list(dict.fromkeys(asked))


def name_of(values: Mapping[str, str]) -> str:
    """The name, without an ending, of the files of what these values of the command line ask for."""
    words = {"label": "class {}".format, "image": lambda path: epath.Path(path).stem}
    return stem(" ".join(words.get(name, str)(value) for name, value in values.items()))


class SampleFiles:
    """The files of one call.

    base      path of all of them without its end: `<base>.png`, `-1.png` and so on, `.npy` and `.json`; of a call that
              makes images of several names, the name stands behind it
    formats   of `FORMATS`
    """

    def __init__(self, base: str, formats: Sequence[str]):
        root, ending = os.path.splitext(base)
        known = ending.lower() in (".png", ".npy", ".json")
        self.base, self.formats = root if known else base, formats
        # another ending of --output is kept for the grid
        self.grid = base if ending and ending.lower() not in (".npy", ".json") else f"{self.base}.png"
        self.json = f"{self.base}.json"

    def write_images(self, found: Sequence[Mapping[str, Any]], titles: Sequence[str]) -> tuple[list[str], list[dict]]:
        """Writes what the formats have of the images, `[h, w, 1 or 3]` uint8, the grid with a title each. Returns
        the paths, and of each row its own single images by name.

        Raises OSError, in one sentence, where a file cannot be written.
        """
        from src.evals.grid import caption_grid, save_png

        names = [name for name, value in found[0].items() if is_image(value)]
        paths: list[str] = []
        single: list[dict] = [{} for _ in found]
        for name in names:
            mark = f"-{stem(name)}" if len(names) > 1 else ""
            made = np.stack([row[name] for row in found])
            if "grid" in self.formats:
                root, ending = os.path.splitext(self.grid)
                paths.append(f"{root}{mark}{ending}")
                captions = [title or name for title in titles]
                save_png(paths[-1], caption_grid(scaled(made), captions, columns=min(len(made), COLUMNS)))
            if "png" in self.formats:
                for number, image in enumerate(made):
                    paths.append(f"{self.base}{mark}-{number + 1:0{len(str(len(made)))}}.png")
                    save_png(paths[-1], image if image.shape[2] == 3 else image.repeat(3, axis=2))
                    single[number][name] = os.path.basename(paths[-1])
            if "npy" in self.formats:
                paths.append(f"{self.base}{mark}.npy")
                data = io.BytesIO()
                np.save(data, made, allow_pickle=False)
                write_named(paths[-1], data.getvalue(), "array")
        return paths, single

    def write_sounds(
        self, found: Sequence[Mapping[str, Any]], rates: Mapping[str, int], single: Sequence[dict]
    ) -> list[str]:
        """Writes the waveforms of each row as WAV files of 16 bits, `rates` samples a second by name; what is louder
        than 1 is made quieter. Returns the paths, and puts each into the row's `single`. Raises OSError."""
        from scipy.io import wavfile

        paths: list[str] = []
        for name, rate in rates.items():
            mark = f"-{stem(name)}" if len(rates) > 1 else ""
            for number, row in enumerate(found):
                wave = row[name] / max(1.0, float(np.abs(row[name]).max(initial=0)))
                paths.append(f"{self.base}{mark}-{number + 1:0{len(str(len(found)))}}.wav")
                data = io.BytesIO()
                wavfile.write(data, rate, np.int16(np.rint(wave * 32_767)))
                write_named(paths[-1], data.getvalue(), "WAV file")
                single[number][name] = os.path.basename(paths[-1])
        return paths

    def write_json(
        self,
        found: Sequence[Mapping[str, Any]],
        given: Sequence[Mapping[str, str]],
        about: Mapping[str, Any],
        paths: Sequence[str] = (),
        single: Sequence[Mapping[str, str]] = (),
    ) -> None:
        """Writes `about` (task, step, seed, guidance), the names of the files of all rows, and for each row what was
        given and what was made: a text, or the name of its single image or sound, or null. Raises OSError."""
        own = [name for each in single for name in each.values()]
        samples = []
        for number, (row, values) in enumerate(zip(found, given, strict=True)):
            files = single[number] if single else {}
            plain = {name: None if is_image(value) else value for name, value in row.items()}
            made = {name: files[name] if name in files else _plain(value) for name, value in plain.items()}
            samples.append({"given": dict(values), "made": made})
        files = [name for name in map(os.path.basename, paths) if name not in own]
        told = {**about, "files": files, "samples": samples}
        text = json.dumps(told, indent=2, ensure_ascii=False) + "\n"
        write_named(self.json, text.encode("utf-8", "backslashreplace"), "JSON file")


def is_image(value: Any) -> bool:
    """Whether a generated value can be shown as an image."""
    return isinstance(value, np.ndarray) and value.ndim == 3 and value.shape[2] in (1, 3)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
