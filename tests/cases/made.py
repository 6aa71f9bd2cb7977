"""What the cases share: a temporary folder, small pictures and archives, and the end of a check."""

import io
import os
import pathlib
import struct
import sys
import tarfile
import tempfile
import zlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
TMP = pathlib.Path(tempfile.mkdtemp())
os.environ["XDG_CACHE_HOME"] = str(TMP / "cache")


def _picture(kind, size, **options):
    from PIL import Image

    file = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert("RGB").save(file, kind, **options)
    return file.getvalue()


def jpeg(width=27, height=20):
    return _picture("JPEG", (width, height), quality=95)


def png():
    return _picture("PNG", (27, 20))


def chunk(kind, data, crc=None):
    """A chunk of a PNG file; its checksum is right unless one is given."""
    checksum = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def in_png(*chunks):
    """A PNG file with these chunks behind its header."""
    return png()[:33] + b"".join(chunks) + png()[33:]


def tar(path, members, **options):
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, **options) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def readable(source):
    """The examples of a source that can be read, and what is said of the others."""
    from src.data.example import BadRow

    good, told = [], []
    for number in range(len(source)):
        try:
            good.append(source[number])
        except BadRow as flaw:
            told.append(str(flaw))
    return good, told


def end(*wrong):
    """Ends the check: exit code 1 and the faults, or 0."""
    wrong = [text for text in wrong if text]
    print("fails: " + "; ".join(wrong) if wrong else "passes")
    sys.exit(bool(wrong))
