"""Names of classes: a JSON file {"n01440764": "tench", …}, {"n01440764": {"label": "tench", …}, …} or
{"0": ["n01440764", "tench"], …} (Keras), or a text file with a line `n01440764 tench, Tinca tinca` for each class, of
which the first word is the id and the first of the names counts (Kaggle's `LOC_synset_mapping.txt`).

Two names of ImageNet stand for two classes each; `CLEARER` has other words for those.
"""

from __future__ import annotations

import collections
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from src.common.files.paths import read_bounded
from src.common.files.strict_json import BYTES, is_wide, parse_json
from src.common.tree import listed

BOM = b"\xef\xbb\xbf"
WNID = re.compile(r"n\d{8}")
# What WordNet says of the classes whose published name is another one's, too.
CLEARER = {
    ("n02012849", "crane"): "crane bird",
    ("n03126707", "crane"): "construction crane",
    ("n03710637", "maillot"): "maillot tights",
    ("n03710721", "maillot"): "maillot tank suit",
}


def named_classes(
    ids: Sequence[str], names: str | os.PathLike[str], ambiguous: str = "words", *, whole: bool = False
) -> list[dict[str, str]]:
    """Classes with id and name, numbered as `ids` are, or, if `whole`, as the ids in the file `names` are when sorted.

    An id that is a word names itself, a number of WordNet has no name. `ambiguous` says what happens to names of two
    classes: `words` takes those of `CLEARER` and refuses others, `keep` leaves them (as published).

    Raises FileNotFoundError, and ValueError for names that lack an id or are given twice.
    """
    if ambiguous not in ("words", "keep"):
        raise ValueError(f"ambiguous={ambiguous!r} is unknown: use words or keep")
    told = read_names(names) if os.fspath(names) else {}
    missing = [i for i in ids if i not in told] if told else []
    if missing:
        raise ValueError(
            f"{os.fspath(names)!r} does not name {len(missing)} classes of the data: {listed(missing)}; add them to"
            " that file, or give the folder whose folders are the classes"
        )
    ids = sorted(told) if told and whole else ids
    words = {i: told.get(i, "" if WNID.fullmatch(i) else i.replace("_", " ")) for i in ids}
    words = words if ambiguous == "keep" else distinct(words)
    return [{"id": i, "name": words[i]} for i in ids]


def read_names(path: str | os.PathLike[str]) -> dict[str, str]:
    """Names of classes by id, from a file as the head of this module says.

    Raises FileNotFoundError, ValueError.
    """
    data = read_bounded(path, BYTES, "file of class names").removeprefix(BOM)
    where = os.fspath(path)
    if is_wide(data):
        raise ValueError(f"{where!r} is UTF-16 text: save it as UTF-8")
    if data.lstrip()[:1] in (b"{", b"["):
        words = _of_json(parse_json(data, f"the file of class names {where!r}", finite=False))
    else:
        words = _of_lines(data, where)
    if words and all(isinstance(word, str) and word.strip() for word in words.values()):
        return {i: word.replace("_", " ").strip() for i, word in words.items()}
    raise ValueError(
        f"{where!r} does not name classes: write a JSON object such as"
        ' {"n01440764": "tench"} or {"n01440764": {"label": "tench"}}, or a text file with lines such as'
        ' "n01440764 tench, Tinca tinca"'
    )


def _of_json(told: Any) -> dict[str, Any]:
    """The names by id of a JSON object; nothing for what is none."""
    if not isinstance(told, dict):
        return {}
    pairs = [*told.values()]
    if all(isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) for p in pairs):
        return dict(pairs) if len({i for i, _ in pairs}) == len(pairs) else {}
    return {i: value.get("label") if isinstance(value, dict) else value for i, value in told.items()}


def _of_lines(data: bytes, where: str) -> dict[str, str]:
    """The names by id of a text file; nothing for lines of another form. Raises ValueError for an id given twice, and
    for a line that begins with #, which may be a comment or an id."""
    try:
        told = data.decode().splitlines()
    except UnicodeDecodeError:
        return {}
    if marked := [number for number, line in enumerate(told, 1) if line.lstrip().startswith("#")]:
        raise ValueError(
            f"line {marked[0]} of {where!r} begins with #: take comments away, and name classes whose folders begin"
            " with # in a JSON file"
        )
    lines = [line.split(maxsplit=1) for line in told if line.strip()]
    if not all(len(line) == 2 for line in lines):
        return {}
    if twice := [i for i, count in collections.Counter(i for i, _ in lines).items() if count > 1]:
        raise ValueError(f"{where!r} names classes twice: {listed(twice)}; leave one line for each")
    numbered = lines and all(re.match(r"\d+\s+\S", rest) for _, rest in lines)  # "n02119789 1 kit_fox" of the devkit
    return {i: (rest.split(maxsplit=1)[1] if numbered else rest).split(",")[0] for i, rest in lines}


def distinct(names: Mapping[str, str]) -> dict[str, str]:
    """The names by id, with the words of `CLEARER` where one name stands for two classes.

    Raises ValueError if that does not help.
    """
    seen = collections.Counter(names.values())
    clear = {i: CLEARER.get((i, name), name) if seen[name] > 1 else name for i, name in names.items()}
    left = sorted(name for name, count in collections.Counter(clear.values()).items() if name and count > 1)
    if left:
        raise ValueError(f"classes have one name: {listed(left)}; give them others in names, or set ambiguous='keep'")
    return clear
