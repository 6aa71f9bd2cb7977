"""Names of classes: a JSON file {"n01440764": "tench", …} or {"n01440764": {"label": "tench", …}, …}.

Two names of ImageNet stand for two classes each; `CLEARER` has other words for those.
"""

from __future__ import annotations

import collections
import os
import re
from collections.abc import Mapping, Sequence

from src.common.files.strict_json import read_json
from src.common.tree import listed

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
    told = read_json(path, what="file of class names")
    if isinstance(told, dict):
        words = {i: value.get("label") if isinstance(value, dict) else value for i, value in told.items()}
        if words and all(isinstance(word, str) and word.strip() for word in words.values()):
            return {i: word.replace("_", " ").strip() for i, word in words.items()}
    raise ValueError(
        f"{os.fspath(path)!r} does not name classes: write a JSON object such as"
        ' {"n01440764": "tench"} or {"n01440764": {"label": "tench"}}'
    )


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
