"""Paths of people and names in files: `~` is the home folder, a name stays below its folder, and a file is read up to
a bound."""

from __future__ import annotations

import hashlib
import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from typing import Any, BinaryIO

from etils import epath

from src.common.files.store import is_remote

NAME_LIMIT = 1024  # characters; file systems take 255 for one part and about 4096 for a path
PIECE = 1 << 20  # bytes of one read
LINE = 16 << 20  # bytes of a line, at most
STEM = 60  # characters of a file's name made of a text


def at_home(path: str) -> str:
    """The path with `~` or `~user` at its beginning replaced by that home folder, as a shell does; others unchanged.

    `$` and `~` elsewhere stay as they are. Raises ValueError, in one sentence, for a user that there is not.
    """
    user = re.match(r"~([A-Za-z_][\w.-]*)?(?=/|$)", path)
    if not user:
        return path
    found = os.path.expanduser(path)
    if found == path:
        who = f"no user {user[1]!r} on this machine" if user[1] else "no home folder"
        raise ValueError(
            f"there is {who}, which {shown(path)} begins with: write ./{user[0]} for a folder of that name"
        )
    return found


def all_at_home(group: Any, where: str = "") -> None:
    """Replaces every text of a config that begins as `at_home` says, in place; `where` is the group's dotted path.

    Raises ValueError, naming the key.
    """
    for key in group:
        at = f"{where}.{key}" if where else str(key)
        if hasattr(group[key], "keys"):
            all_at_home(group[key], at)
            continue
        try:
            value = _at_home(group[key])
        except ValueError as error:
            raise ValueError(f"{at}: {error}") from error
        if value is not group[key]:
            group[key] = value


def _at_home(value: Any) -> Any:
    """A value of a config; the same object where nothing begins with a home folder."""
    if isinstance(value, str | os.PathLike):
        text = os.fspath(value)
        found = at_home(text) if isinstance(text, str) else text
        return value if found == text else type(value)(found)
    if isinstance(value, list | tuple):
        found = [_at_home(item) for item in value]
        same = all(a is b for a, b in zip(found, value, strict=True))
        return value if same else type(value)(found)
    if isinstance(value, dict):
        all_at_home(value)
    return value


def member(name: str) -> str:
    """`name` if it is a plain relative path (`a/b.png`) as lists of files and members of archives should have.

    Only the text is looked at. Raises ValueError, in one sentence, for an absolute path, `..`, a drive letter, an
    address (`gs://`), a backslash, a control character, an empty part, or more than `NAME_LIMIT` characters.
    """
    reason = ""
    if not isinstance(name, str) or not name:
        reason = "it is empty or no text"
    elif len(name) > NAME_LIMIT:
        reason = f"it has more than {NAME_LIMIT} characters"
    elif name[0] in "/~" or name[1:2] == ":" or "://" in name:
        reason = "it is absolute"
    elif "\\" in name or any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
        reason = "it has a backslash, a control character or half a surrogate pair"
    elif any(part in ("", ".", "..") for part in name.removeprefix("./").removesuffix("/").split("/")):
        reason = "it has empty parts, '.' or '..'"
    if reason:
        raise ValueError(
            f"the file name {shown(name)} is refused because {reason}: name a file below the folder, such as 'a/b.png'"
        )
    return name


def inside(folder: str | os.PathLike[str], name: str) -> epath.Path:
    """The path of `name` below `folder` (local or in a store), whether or not it exists.

    Raises ValueError, in one sentence, for what `member` refuses and for links that leave the folder. Those of the
    Hugging Face cache, from `snapshots/<revision>` into the `blobs` beside `snapshots`, may.
    """
    root = epath.Path(folder)
    path = root / member(name)
    if is_remote(root):
        return path
    top, real = os.path.realpath(root), os.path.realpath(path)
    allowed = [top]
    if os.path.basename(os.path.dirname(top)) == "snapshots":
        allowed.append(os.path.join(os.path.dirname(os.path.dirname(top)), "blobs"))
    if not any(os.path.commonpath([real, place]) == place for place in allowed):
        raise ValueError(
            f"the file name {shown(name)} is refused because it is a link out of {root}: put the file itself there"
        )
    return path


def read_bounded(path: str | os.PathLike[str], limit: int, what: str = "file") -> bytes:
    """The bytes of a file of at most `limit` bytes; `what` names it in messages ("image", "tokenizer").

    Never reads more than `limit` + 1 bytes, also of a device or a growing file whose size is 0. Raises
    FileNotFoundError, ValueError when it is longer or no plain file, and OSError when it cannot be read.
    """
    where = f"the {what} {shown(os.fspath(path))}"
    try:
        known = None if is_remote(path) else os.stat(path)
        if known and not stat.S_ISREG(known.st_mode):
            raise ValueError(f"{where} is not a plain file: give the path of one")
        data, long = bytearray(), bool(known) and known.st_size > limit
        with epath.Path(path).open("rb") as file:
            while not long and len(data) <= limit and (piece := file.read(min(PIECE, limit + 1 - len(data)))):
                data += piece  # a single read would take the memory of the limit, whatever the size
    except MemoryError:
        raise
    except FileNotFoundError:
        raise FileNotFoundError(f"{where} does not exist: correct the path") from None
    except ValueError as error:
        raise error if str(error).startswith(where) else ValueError(f"{where} is no path ({error})") from error
    except Exception as error:  # a store's client has its own kinds
        reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {shown(error)}"
        raise OSError(f"{where} cannot be read ({reason}): check the path, your rights and the disk") from error
    if long or len(data) > limit:
        raise ValueError(f"{where} has more than {limit:,} bytes, which no such file needs: is it the right one?")
    return bytes(data)


def check_plain(path: str | os.PathLike[str]) -> None:
    """Raises OSError, in one sentence, where something of this machine that is no plain file has this name: a device
    gives bytes without an end, and who opens a pipe waits for another process."""
    if not is_remote(path) and os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f"{os.fspath(path)} is not a plain file: remove it, or move it away")


def bounded_lines(file: BinaryIO, limit: int = LINE) -> Iterator[bytes]:
    """The lines of an open file from its beginning, one at a time in memory.

    Raises ValueError where one is longer than `limit` bytes.
    """
    file.seek(0)
    while line := file.readline(limit + 1):
        if len(line) > limit:
            raise ValueError(f"a line has more than {limit:,} bytes, so that it is no log: move the file away")
        yield line


def stem(text: str, otherwise: str = "sample") -> str:
    """A file's name, without an ending, made of any text: at most 60 of a-z, 0-9 and `-`; `otherwise` of nothing.

    Of ASCII words only capitals and a mark at the end are lost. Where more is (other letters, signs, length), a hash of
    the text stands behind, so that two texts have two names.
    """
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if not text or (len(plain) <= STEM and re.fullmatch(r"[A-Za-z0-9]+( [A-Za-z0-9]+)*[.!?]?", text)):
        return plain or otherwise
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{plain[: STEM - 9].strip('-') or otherwise}-{digest}"


def shown(value: object, limit: int = 120) -> str:
    """Any value for a message: in one line, text and paths quoted, and cut."""
    text = str(value) if isinstance(value, str | os.PathLike | BaseException) else value
    quoted = repr(text[: limit + 1] if isinstance(text, str) else text)
    return quoted if len(quoted) <= limit + 2 else f"{quoted[:limit]}…"
