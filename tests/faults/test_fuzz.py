"""Damaged and hostile files of every kind that is read: a right value or one sentence, within memory and time.

`cases` counts the files given to each reader: a few in the suite, thousands under the mark `faults`.
"""

import contextlib
import io
import json
import resource
import struct
import time
import zlib
from collections import Counter
from datetime import timedelta

import numpy as np
import pytest
from etils import epath
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from src.codecs.text import SentencePiece, train_sentencepiece
from src.common.files.checksums import Running
from src.common.files.images import Limits, read_image
from src.common.files.npy import read_npy
from src.common.files.safetensors import SafeTensors
from src.models.pretrained.about import ONLY, TRUNK, parameters_of, value_of
from src.models.pretrained.hf_config import read_config
from src.models.pretrained.initial_weights import Initial, seal
from src.models.pretrained.old_paths import path_now
from src.tools.conversion import convert
from src.train.checkpoints import metadata
from src.train.checkpoints.integrity import DamageError, on_all_processes
from tests.helpers.recorded import FOLDER

THEN = {
    "text/table/embedding": np.ones((5, 8), np.float32), "text_head/linear/kernel": np.ones((8, 5), np.float32),
    "trunk/final_norm/scale": np.ones(8, np.float32), "trunk/layers/attention_norm/scale": np.ones((2, 8), np.float16),
}  # fmt: skip
WEIGHTS = {path_now(path): array for path, array in THEN.items()}
ROOM = 512 << 20  # bytes of memory that a reader may ask for; the seeds are below 20 kB
NUMBERS = (0, 1, 2, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**53, 2**63 - 1, 2**64 - 1)
TOKENS = (
    b'"', b"{", b"}", b"[", b"]", b",", b":", b"-1", b"1e999", b"NaN", b"null", b"true", b"1.5", b"../", b"\0",
    b"9" * 5000, b"[" * 3000, b'{"a":' * 3000, b"\\ud800", b"\xff\xfe", b"18446744073709551615",
    b"9223372036854775807", b"\xff\xda", b"\xff\xd9", b"IDAT", b"IEND", b"VP8X", b"acTL", b"\xff" * 8, b"\0" * 8,
    b"'descr'", b"|O", b"(" * 300, b"-" * 3000, b'"shape"', b'"dtype"', b'"F64"', b'"hidden_size"', b"O" * 70000,
)  # fmt: skip


def safetensors_file(header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def seeds_of_safetensors():
    entry = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    small = {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}
    none = {"dtype": "I64", "shape": [0, 7], "data_offsets": [32, 32]}
    header = {"__metadata__": {"format": "pt"}, "model.norm.weight": entry, "b": small, "none": none}
    return [safetensors_file(header, np.arange(8, dtype=np.float32).tobytes()), safetensors_file({}, b"")]


def seeds_of_config():
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 48, "intermediate_size": 80}
    llama |= {"num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 97}
    llama |= {"max_position_embeddings": 128, "rms_norm_eps": 1e-5, "rope_theta": 1e4, "rope_scaling": None}
    mono = {"architectures": ["MonoFormerForCausalLM"], "image_size": 64, "patch_size": 2, "in_channels": 4}
    mono |= dict.fromkeys(("learn_sigma", "use_pos_embed", "use_adaln_final_layer", "use_bi_attn_img_tokens"), True)
    mono |= {"decoder_t_embed": "add_before_image_tokens"}
    return [json.dumps(llama).encode(), json.dumps(llama | mono, indent=1).encode()]


def seeds_of_images():
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (12, 17, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = [
        (colour, "PNG", {}),
        (colour.convert("P"), "PNG", {"transparency": 3}),
        (Image.fromarray(rng.integers(0, 65536, (9, 9)).astype(np.uint16)), "PNG", {}),
        (colour, "PNG", {"save_all": True, "append_images": [colour.transpose(Image.Transpose.ROTATE_180)]}),
        (colour, "JPEG", {"exif": exif.tobytes()}),
        (colour, "JPEG", {"progressive": True}),
        (colour.convert("CMYK"), "JPEG", {}),
        (colour, "WEBP", {"lossless": True, "exif": exif.tobytes()}),
        (colour, "WEBP", {"save_all": True, "append_images": [colour.transpose(Image.Transpose.ROTATE_180)]}),
        (colour, "WEBP", {"quality": 50}),
        (colour, "GIF", {"save_all": True, "append_images": [colour.transpose(Image.Transpose.ROTATE_180)]}),
        (colour, "BMP", {}),
    ]
    files = [io.BytesIO() for _ in kinds]
    for file, (image, name, options) in zip(files, kinds, strict=True):
        image.save(file, name, **options)
    return [file.getvalue() for file in files]


def seeds_of_npy():
    files = []
    for array in (
        np.arange(12.0).reshape(3, 4),
        np.zeros((0, 5), np.int8),
        np.asfortranarray(np.ones((4, 2, 3), "f2")),
    ):
        file = io.BytesIO()
        np.save(file, array)
        files.append(file.getvalue())
    wide = io.BytesIO()
    np.lib.format.write_array(wide, np.arange(5), version=(2, 0))
    return [*files, wide.getvalue()]


def seeds_of_sentencepiece(folder):
    path = folder / "seed.model"
    seeds = []
    for size, fallback in ((60, False), (330, True)):
        train_sentencepiece(["a handwritten seven", "three plus four is seven"] * 3, size, path, fallback)
        seeds.append(path.read_bytes())
    return seeds


def seeds_of_meta():
    meta = {"format": 1, "step": 7, "config": {"optim": {"grad_clip": float("inf")}}, "data": 5}
    meta |= {"leaves": {"params/a": {"print": [1, 2], "dtype": "float32", "shape": [2]}}}
    config = json.loads((FOLDER / "format_2" / "configs.json").read_text())["digits:debug"]
    leaves = {f"params/{path}": {"print": 3, "dtype": "float32", "shape": list(a.shape)} for path, a in THEN.items()}
    older = meta | {"format": 2, "config": config | {"tokenizer": "ab", "frozen": {}}, "leaves": leaves}
    metas = [meta, older, meta | {"format": metadata.FORMAT}]
    return [json.dumps(each | {"seal": metadata.checksum(each)}).encode() for each in metas]


def read_safetensors(path):
    tensors = SafeTensors(path)
    with safe_open(path, framework="np") as file:  # the library reads the same in all that is accepted
        assert sorted(file.keys()) == sorted(tensors)
        for name, entry in tensors.entries.items():
            assert tensors[name].shape == entry.shape and tensors[name].dtype == entry.dtype
            if not entry.dtype.name.startswith("float8"):
                assert tensors[name].tobytes() == file.get_tensor(name).tobytes()
    assert sum(entry.end - entry.begin for entry in tensors.entries.values()) <= path.stat().st_size


def read_picture(path):
    limits = Limits(pixels=1 << 20)
    for channels in (1, 3):
        pixels = read_image(path, limits, channels=channels)
        assert pixels.dtype == np.uint8 and pixels.shape[2] == channels and 0 < pixels[..., 0].size <= limits.pixels


def read_array(path):
    for mapped in (False, True):
        assert read_npy(path, mapped=mapped).nbytes <= path.stat().st_size


def read_tokenizer(path):
    codec = SentencePiece(path)
    ids = [i for word in ("seven", "three plus") for i in _encoded(codec, word)]
    assert all(0 <= i < codec.vocab_size for i in ids) and isinstance(codec.decode(ids), str)


def _encoded(codec, word):
    try:
        return codec.encode(word)
    except ValueError as error:
        assert "does not know" in str(error)
        return []


def read_meta(path):
    try:
        meta = on_all_processes("meta", lambda: metadata.checked_meta(metadata.read_item(epath.Path(path.parent))))
        metadata.check_format(meta, "it")
        meta, _ = on_all_processes("meta", lambda: metadata.migrated(meta, {"value": {}}))
    except DamageError as error:
        raise ValueError(str(error)) from error
    assert meta["format"] == metadata.FORMAT and isinstance(meta["step"], int) and isinstance(meta["config"], dict)
    with contextlib.suppress(ValueError):  # another architecture
        metadata.check_leaves(meta["leaves"], {}, "it")


def seeds_of_initial():
    about = ONLY | dict(zip(TRUNK, (8, 2, 2, 1, 6, 1e-5, 1e4), strict=True))
    older = {name.removeprefix("model."): value for name, value in about.items()}
    older |= {"image_head.order": "rsc", "image_head.variance": "learned", "vision.name": "vision:Latents"}
    seeds = []
    for number, told, weights in ((2, about, WEIGHTS), (1, older, THEN)):
        leaves = {
            path: {"dtype": array.dtype.name, "shape": list(array.shape), "print": Running().add(array).value()}
            for path, array in weights.items()
        }
        meta = {"format": number, "about": told, "published": {"max_position_embeddings": 64}, "leaves": leaves}
        seeds.append(json.dumps(meta | {"hash": seal(meta)}).encode())
    return seeds


def read_initial(path):
    """As a run and an export read them."""
    older = b'"format": 1,' in path.read_bytes()
    save_file(THEN if older else WEIGHTS, path.parent / "model.safetensors")
    found = Initial(path.parent)
    for name, value in found.meta["about"].items():
        value_of({"model": {"trunk": {"depth": 2}}, "fields": {"image": {"head": {"name": "adaln"}}}}, name, value)
        parameters_of(name)
    for name in found.shapes:
        found.check({name: Running().add(np.stack(list(found.blocks(name)))).value()})
    with contextlib.suppress(ValueError):  # of another model
        convert._config(convert._initial_jobs(path.parent, path.parent / "out", convert.Options())[0][0],
                        convert.Weights(path.parent, "initial"), convert.Options())  # fmt: skip


def mend_initial(data):
    """The hash of whatever is there now."""
    try:
        meta = {key: value for key, value in json.loads(data).items() if key != "hash"}
        return json.dumps(meta | {"hash": seal(meta)}).encode()
    except (ValueError, AttributeError, RecursionError, KeyError):
        return data


def mend_safetensors(data):
    """The header's length as far as its last brace, so that what is in it is looked at."""
    end = data.rfind(b"}") + 1
    return struct.pack("<Q", end - 8) + data[8:] if end >= 10 else data


def mend_image(data):
    """The checksums of a PNG and the size of a WebP file, so that their decoders see what was changed."""
    if data[:4] == b"RIFF":
        return data[:4] + struct.pack("<I", max(0, len(data) - 8)) + data[8:]
    out, at = bytearray(data[:8]), 8
    while data[:4] == b"\x89PNG" and at + 12 <= len(data):
        size = min(int.from_bytes(data[at : at + 4], "big"), len(data) - at - 12)
        body = data[at + 4 : at + 8 + size]
        out += size.to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
        at += 12 + size
    return bytes(out) if data[:4] == b"\x89PNG" else data


def mend_npy(data):
    """The header's length as far as its line break."""
    end = data.find(b"\n", 10)
    return data[:8] + struct.pack("<H", end - 9) + data[10:] if data[6:7] == b"\1" and 9 < end < 65000 else data


def mend_meta(data):
    """The seal, over whatever is there now."""
    try:
        meta = {key: value for key, value in json.loads(data).items() if key != "seal"}
        return json.dumps(meta | {"seal": metadata.checksum(meta)}).encode()
    except (ValueError, AttributeError, RecursionError):
        return data


def as_is(data):
    return data


READERS = {
    "safetensors": (seeds_of_safetensors, "a.safetensors", read_safetensors, mend_safetensors),
    "config": (seeds_of_config, "config.json", read_config, as_is),
    "image": (seeds_of_images, "a.png", read_picture, mend_image),
    "npy": (seeds_of_npy, "a.npy", read_array, mend_npy),
    "sentencepiece": (seeds_of_sentencepiece, "a.model", read_tokenizer, as_is),
    "meta": (seeds_of_meta, "metadata", read_meta, mend_meta),
    "initial": (seeds_of_initial, "weights.json", read_initial, mend_initial),
}


@st.composite
def damaged(draw, seeds, mend):
    """A sound file with one to three changes, the sums and lengths around them set right in half of the cases."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.sampled_from((1, 1, 1, 2, 3)))):
        at = draw(st.integers(0, max(0, min(len(data) - 1, draw(st.sampled_from((7, 63, 255, 1 << 20)))))))
        kind = draw(st.integers(0, 7))
        if kind == 0 and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == 1:
            del data[at:]
        elif kind == 2:
            del data[at : at + draw(st.integers(1, 16))]
        elif kind == 3:
            data[at:at] = draw(st.sampled_from(TOKENS))
        elif kind == 4:  # a size, in either order and any width
            width, order = draw(st.sampled_from((1, 2, 3, 4, 8))), draw(st.sampled_from(("little", "big")))
            size = (draw(st.sampled_from(NUMBERS)) % 256**width).to_bytes(width, order)
            data[at : at + width] = size
        elif kind == 5:  # digits of a text
            digits = [i for i, byte in enumerate(data[:4096]) if 48 <= byte < 58]
            if digits:
                place = draw(st.sampled_from(digits))
                data[place : place + 1] = str(draw(st.sampled_from((*NUMBERS, -1, 10**30)))).encode()
        elif kind == 6:
            data[at:at] = data[at : at + draw(st.integers(1, 64))]
        else:
            data[at:] = draw(st.binary(max_size=64))
    return mend(bytes(data)) if draw(st.booleans()) else bytes(data)


def fuzz(name, folder, cases, derandomize):
    """How many files were read and how many refused. Raises at the first other outcome."""
    make, file_name, read, mend = READERS[name]
    seeds = make(folder) if name == "sentencepiece" else make()
    path, counts = folder / file_name, Counter()

    @settings(
        max_examples=cases, derandomize=derandomize, database=None, deadline=timedelta(seconds=10),
        phases=(Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(damaged(seeds, mend))
    def one(data):
        path.write_bytes(data)
        try:
            read(path)
            counts["read"] += 1
        except (ValueError, OSError) as error:
            counts["refused"] += 1
            assert str(error) and "\n" not in str(error) and len(str(error)) < 2000, error
            assert not isinstance(error, UnicodeError), error

    for seed in seeds:  # the way there is sound
        path.write_bytes(seed)
        read(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)  # not RLIMIT_AS, which counts what threads only reserve
    with open("/proc/self/status") as status:
        used = 1024 * int(next(line for line in status if line.startswith("VmData:")).split()[1])
    resource.setrlimit(resource.RLIMIT_DATA, (used + ROOM, hard))
    try:
        one()
    except Exception as error:  # in short: the file is there, and hypothesis would print all of it
        reasons = "; ".join(f"{type(e).__name__}: {str(e)[:500]}" for e in getattr(error, "exceptions", [error]))
        raise AssertionError(f"{path} makes {reasons}") from None
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    return counts


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow, about what it leaves out
@pytest.mark.parametrize("name", READERS)
def test_hostile_files_are_read_or_refused(name, tmp_path):
    counts = fuzz(name, tmp_path, cases=60, derandomize=True)
    assert counts["read"] and counts["refused"] > 20, counts


@pytest.mark.parametrize(
    ("name", "value"),
    [("step", "7"), ("config", None), ("leaves", [1]), ("leaves", {"a": 1}), ("leaves", {"a": {"dtype": 1}})]
    + [("format", wrong) for wrong in (-(10**12), "1", None)],
)
def test_a_right_seal_around_anything_else_is_damage(name, value, tmp_path):
    for seed in seeds_of_meta():
        meta = {key: was for key, was in json.loads(seed).items() if key != "seal"} | {name: value}
        (tmp_path / "metadata").write_text(json.dumps(meta | {"seal": metadata.checksum(meta)}))
        with pytest.raises(
            ValueError, match=r"^meta: .*(has another type than this version writes|it has no format|Error: )"
        ):
            read_meta(tmp_path / "metadata")


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", READERS)
def test_thousands_of_hostile_files_are_read_or_refused(name, tmp_path):
    began = time.monotonic()
    counts = fuzz(name, tmp_path, cases=3000, derandomize=False)
    print(f"{name}: {counts['read']} read, {counts['refused']} refused in {time.monotonic() - began:.0f} s")
    assert counts.total() >= 3000 and counts["refused"] > 1000
