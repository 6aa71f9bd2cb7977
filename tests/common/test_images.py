"""Image files from strangers: every common kind gives its pixels, bombs and damage one sentence."""

import io
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from src.common.files.images import ImageError, Limits, read_image

COLOUR = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
GREY = COLOUR[..., 0]


def encoded(pixels, kind="PNG", **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def test_lossless_kinds_give_their_pixels(tmp_path):
    (tmp_path / "a.txt").write_bytes(encoded(COLOUR))
    np.testing.assert_array_equal(read_image(tmp_path / "a.txt"), COLOUR)  # by content, whatever the name
    for data in (encoded(COLOUR, "WEBP", lossless=True), encoded(COLOUR, "BMP"), encoded(COLOUR, "GIF")):
        np.testing.assert_array_equal(read_image(data), COLOUR)
    np.testing.assert_array_equal(read_image(encoded(GREY), channels=1)[..., 0], GREY)
    np.testing.assert_array_equal(read_image(encoded(GREY))[..., 2], GREY)
    deep = encoded(GREY.astype(np.uint16) * 257)
    np.testing.assert_array_equal(read_image(deep, channels=1)[..., 0], GREY)
    bits = Image.fromarray(GREY > 127)
    np.testing.assert_array_equal(read_image(encoded(bits), channels=1)[..., 0], (GREY > 127) * np.uint8(255))


def test_transparent_pixels_lie_on_white():
    clear = np.dstack([COLOUR, np.full(GREY.shape, 255, np.uint8)])
    clear[0, 0, 3], clear[0, 1] = 0, (0, 0, 0, 128)
    read = read_image(encoded(clear))
    assert read[0, 0].tolist() == [255] * 3 and abs(int(read[0, 1, 0]) - 127) <= 1
    np.testing.assert_array_equal(read[1:], COLOUR[1:])
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 9, 8, 7])
    palette.putdata([0, 1])
    assert read_image(encoded(palette, transparency=0))[0].tolist() == [[255] * 3, [9, 8, 7]]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_orientation_frames_and_cmyk():
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        want = {
            1: COLOUR, 2: COLOUR[:, ::-1], 3: COLOUR[::-1, ::-1], 4: COLOUR[::-1], 5: COLOUR.swapaxes(0, 1),
            6: COLOUR.swapaxes(0, 1)[:, ::-1], 7: COLOUR.swapaxes(0, 1)[::-1, ::-1], 8: COLOUR.swapaxes(0, 1)[::-1],
        }[orientation]  # fmt: skip
        np.testing.assert_array_equal(read_image(encoded(COLOUR, exif=exif)), want)
    spoilt = b"Exif\0\0MM\0*" + b"\xff" * 30
    for data in (encoded(COLOUR, "JPEG", exif=spoilt), encoded(COLOUR, exif=b"no TIFF"), encoded(COLOUR, exif=spoilt)):
        assert read_image(data).shape == COLOUR.shape
    frames = [Image.fromarray(np.full((4, 4, 3), value, np.uint8)) for value in (10, 200)]
    for kind, options in (("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {})):
        moving = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert Image.open(io.BytesIO(moving)).n_frames == 2 and (read_image(moving) == 10).all()
    red = encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")
    assert abs(read_image(red).astype(int) - [255, 0, 0]).max() < 12


def chunk(kind, data, crc=None):
    """A chunk of a PNG file, with a sound checksum if none is given."""
    crc = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)


def in_png(*chunks, pixels=COLOUR, **options):
    """A PNG file with these chunks behind its header."""
    data = encoded(pixels, **options)
    return data[:33] + b"".join(chunks) + data[33:]


def in_jpeg(*segments):
    """A JPEG file with these segments, (code, bytes), in its header."""
    data = encoded(COLOUR, "JPEG")
    return data[:2] + b"".join(b"\xff" + bytes([c]) + struct.pack(">H", len(d) + 2) + d for c, d in segments) + data[2:]


def png(width, height, rows=b""):
    """A PNG that claims a size, with sound checksums."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


LONG = zlib.compress(b"{}" * 1_000_000)
NOTES = {
    "long zTXt": (chunk(b"zTXt", b"workflow\0\0" + LONG),),
    "long tEXt": (chunk(b"tEXt", b"workflow\0" + b"x" * 3_000_000),),
    "long iTXt": (chunk(b"iTXt", b"prompt\0\1\0\0\0" + LONG), chunk(b"iTXt", b"a\0\0\0en\0\0" + b"\xff" * 9)),
    "a thousand long texts": tuple(chunk(b"zTXt", b"a\0\0" + LONG) for _ in range(1000)),
    "long text of an orientation": (chunk(b"zTXt", b"Raw profile type exif\0\0" + LONG),) * 40,
    "long text in XMP": (chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + LONG),),
    "text without a keyword": (chunk(b"tEXt", b""), chunk(b"zTXt", b"x"), chunk(b"iTXt", b"y\0")),
    "text that is not packed": (chunk(b"zTXt", b"Raw profile type exif\0\0" + b"\xff" * 30),),
    "long profile": (chunk(b"iCCP", b"p\0\0" + zlib.compress(bytes(3_000_000))),),
    "broken profile": (
        chunk(b"iCCP", b"p\0\7nonsense"),
        chunk(b"gAMA", b""),
        chunk(b"cHRM", b"1"),
        chunk(b"pHYs", b""),
    ),
    "long EXIF": (chunk(b"eXIf", b"MM\0*" + b"\xff" * 3_000_000),),
    "EXIF of another checksum": (chunk(b"eXIf", b"II*\0", crc=7),),
    "text of another checksum": (chunk(b"tEXt", b"a\0b", crc=7), chunk(b"tIME", b"now", crc=0)),
    "private": (chunk(b"prVW", bytes(300_000)), chunk(b"iDOT", b"?")),
    "animation": (chunk(b"acTL", b"broken"), chunk(b"fcTL", b"x"), chunk(b"fdAT", b"\0\0\0\1y")),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("name", NOTES)
def test_metadata_of_any_length_leaves_a_png_as_it_is(name):
    np.testing.assert_array_equal(read_image(in_png(*NOTES[name])), COLOUR)
    palette = Image.new("P", (2, 1))
    palette.putpalette([0, 0, 0, 9, 8, 7])
    palette.putdata([0, 1])
    clear = read_image(in_png(*NOTES[name], pixels=palette, transparency=0))
    assert clear[0].tolist() == [[255] * 3, [9, 8, 7]]


def test_what_stands_behind_the_end_of_an_image_is_ignored():
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP"):
        data = encoded(COLOUR, kind)
        for rest in (b"x", bytes(100), b"ftypmp42" + b"\0\xff\xda\x11" * 200, data, b"PK\3\4" + bytes(999)):
            np.testing.assert_array_equal(read_image(data + rest), read_image(data), err_msg=kind)


def test_segments_of_a_jpeg_leave_it_as_it_is():
    plain = read_image(encoded(COLOUR, "JPEG"))
    scan = b"\xff\xda\0\2" * 500
    index = b"MPF\0MM\0*" + b"\xff" * 60
    for segments in (
        [(0xE2, b"ICC_PROFILE\0\1\2" + b"\xff" * 60_000)] * 40,
        [(0xED, b"Photoshop 3.0\08BIM\4\4\0\0\xff\xff\xff\xff"), (0xE2, index), (0xFE, scan)],
        [(0xE1, b"Exif\0\0" + scan), (0xE1, b"Exif\0\0II*\0"), (0xE1, b"http://ns.adobe.com/xap/1.0/\0<x")],
        [(0xE2, b"FPXR\0" + encoded(COLOUR, "JPEG")), (0xEB, b"JP"), (0xEF, b""), (0xE0, b"JFXX\0")],
    ):
        np.testing.assert_array_equal(read_image(in_jpeg(*segments)), plain)
    filled = encoded(COLOUR, "JPEG")
    np.testing.assert_array_equal(read_image(filled[:2] + b"\xff" * 9 + filled[2:]), plain)
    restarts = encoded(np.tile(COLOUR, (20, 20, 1)), "JPEG", restart_marker_blocks=1)
    with Image.open(io.BytesIO(restarts)) as image:
        np.testing.assert_array_equal(read_image(restarts), image.convert("RGB"))
    both = io.BytesIO()
    first, second = (Image.fromarray(np.full((16, 16, 3), value, np.uint8)) for value in (10, 200))
    first.save(both, "MPO", save_all=True, append_images=[second], quality=100)
    assert (read_image(both.getvalue()) == 10).all()


def test_texts_turn_an_image_as_exif_does():
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = exif.tobytes()
    text = b"\nexif\n%8d\n" % len(raw) + raw.hex().encode() + b"\n"
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    for turned in (
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text)),
        chunk(b"tEXt", b"Raw profile type exif\0" + text),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp)),
        chunk(b"eXIf", raw.removeprefix(b"Exif\0\0")),
    ):
        np.testing.assert_array_equal(read_image(in_png(turned)), COLOUR.swapaxes(0, 1)[:, ::-1])


def webp_canvas(width, height):
    body = b"VP8X" + struct.pack("<II", 10, 2) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    anim = b"ANIM" + struct.pack("<IIH", 6, 0, 0)
    return b"RIFF" + struct.pack("<I", 4 + len(body + anim)) + b"WEBP" + body + anim


def scans():
    data = encoded(np.zeros((2048, 2048), np.uint8), "JPEG", progressive=True)
    last = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + last * 100_000 + data[-2:]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: png(60_000, 60_000), "3600000000 pixels"),
        (lambda: png(2**31 - 1, 2**31 - 1), "pixels|ValueError|OSError|SyntaxError"),
        (lambda: png(10_000, 6711), "10000 x 6711 pixels and 67,108,864"),
        (
            lambda: encoded(COLOUR)[:33] + 200_000 * chunk(b"teSt", b"") + encoded(COLOUR)[33:],
            "more than 131,072 chunks",
        ),
        (lambda: encoded(COLOUR, "JPEG")[:2] + 200_000 * b"\xff\xef\0\2" + encoded(COLOUR, "JPEG")[2:], "segments"),
        (lambda: in_png(chunk(b"CgBI", b"\x50\0\x20\2")), "chunk b'CgBI' is of no PNG"),
        (lambda: in_png(chunk(b"tRNS", bytes(6), crc=1)), "chunk b'tRNS' has a wrong checksum"),
        (lambda: in_png(chunk(b"prIv", b"xy", crc=1)), "chunk b'prIv' has a wrong checksum"),
        (lambda: encoded(COLOUR)[:-12], "it is truncated"),
        (lambda: webp_canvas(16_383, 16_383), "16383 x 16383 pixels"),
        (scans, "more than 100 scans"),
        (lambda: b"GIF89a" + b"\xff" * 500, ""),
        (lambda: encoded(COLOUR)[:-60], "truncated|broken|unrecognized|OSError|SyntaxError"),
        (lambda: encoded(COLOUR, "JPEG")[:-60], "truncated"),
        (lambda: encoded(COLOUR, "WEBP")[:-9], "OSError|does not begin"),
        (lambda: encoded(COLOUR, "GIF")[:-60], "truncated|OSError"),
        (lambda: encoded(COLOUR, "BMP")[:-9], "truncated|OSError"),
        (lambda: encoded(COLOUR, "TIFF"), "does not begin as a sound PNG"),
        (lambda: b"%!PS-Adobe-3.0 EPSF\n%%BoundingBox: 0 0 9 9\n", "does not begin as a sound PNG"),
        (lambda: b"<svg/>", "does not begin"),
        (lambda: b"", "the file is empty"),
    ],
)
def test_bombs_and_damage_are_refused(make, reason):
    data, began = make(), time.process_time()
    with pytest.raises(ImageError, match=f"^the image is not an image that can be read .*({reason})") as error:
        read_image(data)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert time.process_time() - began < 5


def test_every_flipped_bit_of_a_png_is_noticed():
    data = bytearray(encoded(COLOUR))
    for at in range(len(data) - 12):  # but in the mark of its end
        data[at] ^= 16
        with pytest.raises(ImageError):
            read_image(bytes(data))
        data[at] ^= 16


def test_limits_and_files(tmp_path):
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    data = encoded(COLOUR)
    assert read_image(data, Limits(pixels=54)).shape == (6, 9, 3)
    for limits, words in ((Limits(pixels=53), "9 x 6 pixels and 53"), (Limits(bytes=9), "more than 9 bytes")):
        with pytest.raises(ImageError, match=words):
            read_image(data, limits)
    with pytest.raises(ImageError, match="as a sound JPEG"):
        read_image(data, Limits(formats=("JPEG",)))
    (tmp_path / "a.png").write_bytes(data)
    for path, words in ((tmp_path / "a.png", "more than 9 bytes"), (tmp_path, "plain file"), ("/dev/zero", "plain")):
        with pytest.raises(ImageError, match=words):
            read_image(path, Limits(bytes=9))
    with pytest.raises(FileNotFoundError, match=r"the image .*none.png' does not exist"):
        read_image(tmp_path / "none.png")
