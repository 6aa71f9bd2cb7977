"""Text files in gzip or zstd: rows are read by number, so a file is unpacked once, into the cache of this machine."""

from __future__ import annotations

import gzip
import hashlib
import os
import pathlib
import shutil
import zlib
from collections.abc import Iterator
from typing import Any

from absl import logging

from src.common.files.store import cache_folder, local_copy, write_whole
from src.data.files.index_cache import stamp

ENDINGS = (".gz", ".zst")
PIECE = 1 << 22  # bytes that are unpacked at a time
SPARE = 1 << 28  # bytes of the disk that stay free


def is_compressed(path: str | os.PathLike[str]) -> bool:
    """Whether a file's name ends as those of gzip and zstd do."""
    return os.fspath(path).lower().endswith(ENDINGS)


def unpacked(path: str | os.PathLike[str]) -> pathlib.Path:
    """The local file: itself, or, of a local or remote `*.gz` or `*.zst`, what is in it. That lies in the cache, made
    once for each size and time of change.

    Raises FileNotFoundError if the file does not exist, ValueError for one that is damaged or cut off or is no gzip
    or zstd file, OSError where the disk is full.
    """
    local = local_copy(path)
    if not is_compressed(local) or not local.is_file():
        return local
    key = hashlib.sha256(stamp(local).encode(errors="surrogateescape")).hexdigest()[:16]
    target = pathlib.Path(cache_folder(), "unpacked", key, local.stem)
    if not target.exists():
        logging.info("unpacking %s to %s, once on this machine", local, target)
        write_whole(target, _pieces(local, target))
    return target


def _pieces(path: pathlib.Path, target: pathlib.Path) -> Iterator[bytes]:
    """The bytes in a file, piece by piece. Raises as `unpacked`."""
    free, size = shutil.disk_usage(target.parent).free - SPARE, 0
    try:
        with _opened(path) as file:
            while piece := file.read(PIECE):
                size += len(piece)
                if size > free:
                    break
                yield piece
    except (OSError, EOFError, zlib.error) as error:  # gzip and pyarrow tell damage by an OSError, too
        reason = " ".join(str(error).split())[:100]
        raise ValueError(
            f"{os.fspath(path)!r} cannot be unpacked ({reason}): copy it again, or unpack it by hand"
        ) from error
    if size > free:
        raise OSError(
            f"{os.fspath(path)!r} has more than the {free / 1e9:.3g} GB that are free in {os.fspath(target.parent)!r}:"
            " free room, or set XDG_CACHE_HOME to another disk"
        )


def _opened(path: pathlib.Path) -> Any:
    """A reader of what is in a file."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    import pyarrow

    return pyarrow.input_stream(os.fspath(path), compression="zstd")
