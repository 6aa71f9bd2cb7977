"""Prompts of text-to-image benchmarks, and images in the folders that their judges read.

| benchmark | prompts | what the judge reads |
|---|---|---|
| geneval | `evaluation_metadata.jsonl` | `00000/metadata.jsonl`, `00000/samples/0000.png`, … |
| dpg | a folder of `<name>.txt` | `<name>.png`, four images as a 2 x 2 grid |
| wise | a JSON list of `prompt_id`, `Prompt` | `<prompt_id>.png` |
| t2i_compbench | a text file, a prompt in each line | `<prompt>_000000.png`, numbered through all prompts |
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from jaxtyping import UInt8

from src.common.files.paths import member, read_bounded, shown
from src.common.files.store import write_named
from src.common.files.strict_json import read_json
from src.evals.given import read_prompts
from src.evals.grid import save_png

LIMIT = 64 << 20  # bytes of a file of prompts
GRID = 4  # images of a prompt in a grid of dpg
LONGEST = 240  # bytes of a name; file systems take 255, and a number and an ending follow


@dataclasses.dataclass(frozen=True)
class BenchmarkPrompt:
    """A prompt; `name` is what its files are called, `record` what the benchmark says of it, as a line of JSON."""

    text: str
    name: str = ""
    record: str = ""


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """How a benchmark's prompts are read, how many images each has, and how the images of one are written.

    write   (folder, prompt, its number, images [each, h, w, 3])
    """

    read: Callable[[str], list[BenchmarkPrompt]]
    each: int
    write: Callable[[pathlib.Path, BenchmarkPrompt, int, UInt8[np.ndarray, "n h w 3"]], None]


def _read_geneval(path: str) -> list[BenchmarkPrompt]:
    found = []
    for number, line in enumerate(read_bounded(path, LIMIT, "file of prompts").splitlines(), 1):
        try:
            record = json.loads(line)
            found.append(BenchmarkPrompt(_text(record["prompt"]), f"{number - 1:05d}", line.decode()))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(
                f"--prompts={path}, line {number} is no JSON object with a prompt: give evaluation_metadata.jsonl"
            ) from error
    return found


def _read_dpg(path: str) -> list[BenchmarkPrompt]:
    files = sorted(pathlib.Path(path).glob("*.txt"))
    if not files:
        raise ValueError(f"--prompts={path} is no folder of .txt files, one for each prompt: give DPG-Bench's prompts")
    return [BenchmarkPrompt(" ".join(read_prompts(str(file))), file.stem) for file in files]


def _read_wise(path: str) -> list[BenchmarkPrompt]:
    rows = read_json(path, limit=LIMIT, what="file of prompts")
    try:
        return [
            BenchmarkPrompt(_text(row["Prompt"]), _file_name(str(row["prompt_id"])), json.dumps(row)) for row in rows
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"--prompts={path} is no list of objects with prompt_id and Prompt ({shown(error)}): give a file of WISE"
        ) from error


def _read_lines(path: str) -> list[BenchmarkPrompt]:
    return [BenchmarkPrompt(line, _file_name(line)) for line in read_prompts(path)]


def _file_name(text: str) -> str:
    """What files are called by. Raises ValueError for what cannot be a part of a name."""
    if "/" in text or len(text.encode()) > LONGEST:
        raise ValueError(f"{shown(text)} has a slash or more than {LONGEST} bytes, and its images are named by it")
    return member(text)


def _text(value: object) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"the prompt is {shown(value)}")
    return value


def _write_geneval(folder: pathlib.Path, prompt: BenchmarkPrompt, number: int, images: np.ndarray) -> None:
    place = folder / prompt.name
    write_named(place / "metadata.jsonl", (prompt.record + "\n").encode(), "file")
    for index, image in enumerate(images):
        save_png(place / f"samples/{index:04d}.png", image)


def _write_dpg(folder: pathlib.Path, prompt: BenchmarkPrompt, number: int, images: np.ndarray) -> None:
    rows = [np.concatenate(list(pair), axis=1) for pair in (images[:2], images[2:])]
    save_png(folder / f"{prompt.name}.png", np.concatenate(rows, axis=0))


def _write_wise(folder: pathlib.Path, prompt: BenchmarkPrompt, number: int, images: np.ndarray) -> None:
    save_png(folder / f"{prompt.name}.png", images[0])


def _write_numbered(folder: pathlib.Path, prompt: BenchmarkPrompt, number: int, images: np.ndarray) -> None:
    for index, image in enumerate(images):
        name = f"{prompt.name}_{number * len(images) + index:06d}.png"
        save_png(folder / name, image)


BENCHMARKS = {
    "geneval": Benchmark(_read_geneval, 4, _write_geneval),
    "dpg": Benchmark(_read_dpg, GRID, _write_dpg),
    "wise": Benchmark(_read_wise, 1, _write_wise),
    "t2i_compbench": Benchmark(_read_lines, 10, _write_numbered),
}


def read_benchmark(name: str, path: str) -> list[BenchmarkPrompt]:
    """The prompts of a benchmark.

    Raises FileNotFoundError, and ValueError, in one sentence, for another form, no prompts, and two of one name.
    """
    prompts = BENCHMARKS[name].read(path)
    names = [prompt.name for prompt in prompts]
    if not prompts:
        raise ValueError(f"--prompts={path} has no prompts")
    if len(set(names)) < len(names):
        twice = next(each for each in names if names.count(each) > 1)
        raise ValueError(f"--prompts={path} has {shown(twice)} twice, and their images would have one name")
    return prompts


def write_benchmark(
    name: str, folder: pathlib.Path, prompts: Sequence[BenchmarkPrompt], images: Iterable[np.ndarray]
) -> None:
    """The images [each, h, w, 3] of each prompt as the benchmark's judge reads them. Raises OSError."""
    for number, (prompt, made) in enumerate(zip(prompts, images, strict=True)):
        BENCHMARKS[name].write(folder, prompt, number, made)
