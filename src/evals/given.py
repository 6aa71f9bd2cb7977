"""What a person gives on the command line, as an example for a task: `--given name=value`, and the short forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from src.common.files.images import read_image
from src.common.files.paths import at_home, read_bounded
from src.common.lookup import nearest
from src.evals.tasks import starts
from src.interfaces import Field

PROMPTS = 16 << 20  # bytes of a file of prompts, at most
SHORT = ("prompt", "label", "image")  # names that have a flag of their own


def values_of(given: Sequence[str], **short: Any) -> dict[str, str]:
    """The values by name. Raises ValueError for what is no name=value, for a name that is there twice, and for none."""
    values: dict[str, str] = {}
    pairs = [(name, str(value)) for name, value in short.items() if value is not None]
    for told in given:
        name, sign, value = told.partition("=")
        if not sign or not name:
            raise ValueError(f'--given={told} is no name=value; give e.g. --given prompt="a handwritten three"')
        pairs.append((name, value))
    for name, value in pairs:
        if name in values:
            raise ValueError(f"{name} is given twice: give it once, as --given {name}=…")
        values[name] = value
    if not values:
        raise ValueError(
            '--mode=sample needs something to start from: --prompt="…", --label=… or --image=file.png, --prompts=FILE, '
            "or --given name=value for each value"
        )
    return values


def asked_of(given: Sequence[str], prompts: str | None, **short: Any) -> list[dict[str, str]]:
    """The values of each row: one, or one for each line of the file `prompts`.

    Raises ValueError as `values_of` and `read_prompts` do, and for another prompt beside the file.
    """
    if prompts is None:
        return [values_of(given, **short)]
    if short.get("prompt") is not None or any(told.startswith(("prompt=", "caption=")) for told in given):
        raise ValueError(f"the prompt is given twice, by itself and by --prompts={prompts}: give one of them")
    return [values_of(given, **short | {"prompt": line}) for line in read_prompts(prompts)]


def read_prompts(path: str) -> list[str]:
    """The lines of a text file in UTF-8, a prompt each; empty lines at the end do not count.

    Raises FileNotFoundError, OSError, and ValueError for another encoding, an empty line, and no lines.
    """
    data = read_bounded(path, PROMPTS, "file of prompts")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"--prompts={path}: line {line} is no UTF-8 text: save the file as UTF-8") from None
    lines = [line.removesuffix("\r") for line in text.rstrip().split("\n")]
    if not text.strip():
        raise ValueError(f"--prompts={path} has no lines: write a prompt in each")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise ValueError(f"--prompts={path}: line {number} is empty: remove it, or write a prompt there")
    return lines


def choose_task(tasks: Mapping[str, Any], values: Mapping[str, str], name: str | None) -> str:
    """The task `name`, or else the one that starts from most of the values, the first of several.

    Raises ValueError where there is none, or where it does not start from them.
    """
    if name is not None and name not in tasks:
        raise ValueError(f"there is no task {name!r}; this system has {', '.join(tasks)}")
    found = {each: _fits(tasks[each], values) for each in ([name] if name else tasks)}
    possible = {each: fit for each, fit in found.items() if fit is not None}
    if possible:
        chosen = max(possible, key=lambda each: possible[each])
        words = text_value(tasks[chosen])
        if words != "prompt" and {"prompt", words} <= set(values):
            raise ValueError(f"the text of task {chosen} is given twice, as prompt and as {words}: give one of them")
        return chosen
    known = {"prompt", *(each for task in tasks.values() for each in _known(task))}
    for value in values:
        if value not in known and (near := nearest(value, known)):
            raise ValueError(f"no task starts from {_told(value)}: did you mean {near}?")
    told = " and ".join(_told(value) for value in values)
    if name or len(tasks) == 1:
        name = name or next(iter(tasks))
        raise ValueError(f"task {name} starts from {_starts(tasks[name])}, not {told} (see --task)")
    each = ", ".join(f"{name} from {_starts(task)}" for name, task in tasks.items())
    raise ValueError(f"no task starts from {told}: {each} (see --task)")


def example_of(task: Any, fields: Mapping[str, Field], values: Mapping[str, str]) -> dict[str, Any]:
    """The example that a task starts from.

    Raises ValueError for a class that is none, FileNotFoundError, OSError and ValueError for an image file.
    """
    example: dict[str, Any] = {}
    for name, value in values.items():
        field = fields.get(getattr(task.template, name, name))
        host = None if field is None else field.codec.host
        if name == "image":
            example[name] = _image(task, field, at_home(value))
        elif hasattr(host, "count"):
            if not value.isdigit() or int(value) >= host.count:
                raise ValueError(f"--{name}={value} is none of the classes 0 to {host.count - 1}")
            example[name] = int(value)
        else:
            example[text_value(task) if name == "prompt" else name] = value
    return example


def grid_of(task: Any, name: str, given: str | None) -> dict[str, tuple[int, int]]:
    """The bucket of --grid, as a value of the example. Raises ValueError for one that the task does not have."""
    if given is None:
        return {}
    grids = getattr(task.buckets, "grids", ())
    names = [f"{rows}x{columns}" for rows, columns in grids]
    if given not in names:
        raise ValueError(f"--grid={given} is no bucket of task {name}; it has {', '.join(names) or 'none'}")
    return {"grid": grids[names.index(given)]}


def title(example: Mapping[str, Any], number: int = 0) -> str:
    """What an image of the example was asked for by, in words; of several texts that mean the same, row `number` of a
    call has another one than the row before."""
    for name in ("caption", "prompt", "label"):
        value = example.get(name)
        value = value[number % len(value)] if isinstance(value, list | tuple) and value else value
        if isinstance(value, str | int | np.integer):
            return f"class {value}" if name == "label" else str(value)
    return ""


def text_value(task: Any) -> str:
    """The value that the words of a prompt are: what the task draws, or the beginning of what it writes."""
    caption = getattr(task.template, "caption", None)
    return caption if caption and caption not in task.template.answers else "prompt"


def _fits(task: Any, values: Mapping[str, str]) -> int | None:
    """How many values that the task starts from are there; None where one that it must have is missing, or one is not
    known to it. Words may stand for all of them where the task draws words."""
    words = text_value(task)
    named = {words if name == "prompt" else name for name in values}
    needed = set(starts(task))
    if words != "prompt" and words in named:
        needed = {words}
    used = needed | named & set(task.template.optional)
    return len(used) - len(named & set(task.template.answers)) if needed <= named <= _known(task) else None


def _known(task: Any) -> set[str]:
    """The values that a prompt of the task may have."""
    return {text_value(task), *task.template.needs, *task.template.optional}


def _told(name: str) -> str:
    """The flag that gives a value."""
    return f"--{name}" if name in SHORT else f"--given {name}=…"


def _starts(task: Any) -> str:
    words = text_value(task)
    names = ["prompt" if name == words else name for name in starts(task)] or ["prompt"]
    return " and ".join(_told(name) for name in (*names, *task.template.optional))


def _image(task: Any, field: Field | None, path: str) -> Any:
    """An image file as the source of a task would have it: its path, or, where the source has arrays of the codec's
    size in [-1, 1], such an array."""
    if getattr(task.source, "holds", "pixels") != "values" or field is None:
        if not epath.Path(path).exists():
            raise FileNotFoundError(f"there is no image file {path!r}: correct --image")
        return epath.Path(path)
    from PIL import Image

    height, width, channels = field.codec.delivered
    pixels = read_image(path, channels=channels)
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    image = image.resize((width, height), Image.Resampling.BOX)
    return np.asarray(image, np.float32).reshape(height, width, channels) / 127.5 - 1
