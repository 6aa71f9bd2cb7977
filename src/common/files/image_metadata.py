"""Image files without their metadata: texts, profiles and what stands behind the image cannot spoil its pixels.

The structure is that of the PNG specification (W3C, third edition, sections 5 and 11) and of JPEG (ITU-T T.81, annex
B). What tells how the image is turned (EXIF, XMP) stays, and so does what the colours depend on.
"""

from __future__ import annotations

import re
import zlib

from src.common.files.paths import shown

PNG = b"\x89PNG\r\n\x1a\n"
JPEG = b"\xff\xd8\xff"
CRITICAL = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
USED = (*CRITICAL, b"tRNS")
TEXTS = (b"tEXt", b"zTXt", b"iTXt")
METADATA = (
    b"tEXt zTXt iTXt eXIf iCCP cICP mDCV cLLI sRGB gAMA cHRM sBIT bKGD hIST pHYs sPLT tIME acTL fcTL fdAT"
    b" oFFs pCAL sCAL sTER caBX vpAg orNT"
).split()
TURNED = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # texts that may have an orientation
TURNED_BYTES = 1 << 18  # of such a text, unpacked
PARTS = 1 << 17  # of a file; a chunk of twelve bytes takes as long as one of many
MARKER = re.compile(rb"\xff[\x02-\xcf\xd8-\xfe]")  # of a segment: no filling, no restart, no 0xff of a scan
SOI, EOI, SOS, COMMENT = 0xD8, 0xD9, 0xDA, 0xFE
KEPT = (0xE0, 0xE1, 0xEE)  # JFIF; EXIF and XMP; Adobe's, which tells the colours
DROPPED = {COMMENT, *range(0xE0, 0xF0)} - {*KEPT}


def strip_png(data: bytes) -> bytes:
    """A PNG file without metadata and without what follows its end; of an animation, its still image.

    Raises ValueError for a file that is cut off, has a critical chunk that the specification lacks, more than `PARTS`
    chunks, or a wrong checksum in a chunk that pixels depend on. Metadata with a wrong one are left out.
    """
    parts, at, turned = [PNG], len(PNG), False
    view = memoryview(data)
    for _ in range(PARTS):
        length, kind = int.from_bytes(view[at : at + 4], "big"), bytes(view[at + 4 : at + 8])
        end = at + 12 + length
        if end > len(data):
            raise ValueError("it is truncated")
        body = view[at + 8 : end - 4]
        sound = zlib.crc32(view[at + 4 : end - 4]) == int.from_bytes(view[end - 4 : end], "big")
        if not sound and kind not in METADATA:
            raise ValueError(f"its chunk {shown(kind)} has a wrong checksum")
        if not kind[0] & 32 and kind not in CRITICAL:
            raise ValueError(f"its chunk {shown(kind)} is of no PNG that is known")
        text = sound and kind in TEXTS and not turned and _turns(kind, body)
        turned = turned or text
        if text or (sound and kind in (*USED, b"eXIf")):
            parts.append(view[at:end])
        if kind == b"IEND":
            return b"".join(parts)
        at = end
    raise ValueError(f"it has more than {PARTS:,} chunks")


def _turns(kind: bytes, body: memoryview) -> bool:
    """Whether a chunk is a text that may have an orientation, short enough to be unpacked."""
    name = next((text for text in TURNED if bytes(body[: len(text)]) == text), b"")
    if not name or len(body) > TURNED_BYTES:
        return False
    packed = kind == b"zTXt" or (kind == b"iTXt" and bytes(body[len(name) : len(name) + 1]) == b"\1")
    if not packed:
        return True
    rest = bytes(body[len(name) + 1 :])  # behind the method
    if kind == b"iTXt":
        rest = rest[1:].split(b"\0", 2)[-1]  # behind language and translated name
    try:
        return len(zlib.decompressobj().decompress(rest, TURNED_BYTES + 1)) <= TURNED_BYTES
    except zlib.error:
        return False


def strip_jpeg(data: bytes, scans: int) -> bytes:
    """A JPEG file without metadata, up to the end of its first image; phones and cameras put films and more behind it.

    Raises ValueError for more than `scans` scans or `PARTS` segments.
    """
    parts, at, first, seen, count = [data[:2]], 2, None, 0, 0
    while found := MARKER.search(data, at):
        start, code, count = found.start(), found[0][1], count + 1
        at = start + 2
        if count > PARTS:
            raise ValueError(f"it has more than {PARTS:,} segments")
        if code == EOI:
            break
        if code == SOI:
            continue
        at += max(int.from_bytes(data[at : at + 2], "big"), 2)
        if code == SOS:
            seen, first = seen + 1, start if first is None else first
        if seen > scans:
            raise ValueError(f"it has more than {scans} scans")
        if first is None and code not in DROPPED:
            parts.append(data[start:at])
    else:
        at = len(data)  # an end is missing: the decoder judges that
    return b"".join(parts) + (data[first:at] if first is not None else b"")
