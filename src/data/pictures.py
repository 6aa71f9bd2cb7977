"""Image files with captions: draw what a caption says, or say what an image shows.

The folder holds `captions.jsonl` with a line {"image": "a/b.png", "caption": "two red pears"} for each row, and the
images, by paths below the folder. Broken lines, captions that are empty or no text, images that are missing, lie
outside the folder or cannot be decoded are bad rows (`BadRow`): named by their line, never replaced.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float16, UInt8
from PIL import Image

from src.common.files.images import read_image
from src.common.files.paths import inside
from src.data.example import Example, caption_of
from src.data.file_task import ExampleTask, given
from src.data.files.json_lines import LineFile
from src.data.files.latent_shards import PICTURES, moments_of
from src.data.pipeline.bad_rows import BadRow
from src.data.rows import CHARACTERS, TextTable, image_tokens, prompt_field, tail_table, text_table
from src.interfaces import Field, ImageField, TokenField
from src.sequence.layout import Segment

FILE = "captions.jsonl"
ENDLESS = 2**16  # characters: no caption, whatever `too_long` says
STRETCH = 16  # most times that an image may be as long as it is wide: the longer side is scaled before it is cut


class Lines:
    """The rows of a folder by number, one for each line of `captions.jsonl`.

    Raises FileNotFoundError if the folder has no such file.
    """

    kind = "captions"

    def __init__(self, folder: epath.Path):
        self.folder = folder
        try:
            self._lines = LineFile(folder / FILE)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{os.fspath(folder / FILE)!r} does not exist: the folder needs a line"
                ' {"image": "a.png", "caption": "words"} for each image there'
            ) from error

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Example:
        where, told = self._lines.where(index), self._lines[index]
        image = path_of(self.folder, told.pop("image", None), where)
        return Example(where, {name: text for name, text in told.items() if isinstance(text, str)}, (image,))


def path_of(folder: epath.Path, name: Any, where: str) -> epath.Path:
    """The path of an image that a line names. Raises BadRow."""
    try:
        return inside(folder, name)
    except ValueError as error:
        raise BadRow("the name of the image is not allowed", where, error) from error


def crop(pixels: UInt8[np.ndarray, "h w C"], size: int) -> UInt8[np.ndarray, "size size C"]:
    """The centre of an image: halved by a box filter while its shorter side is at least 2 · size, then scaled by a
    bicubic filter so that this side is `size`, then cut (ADM, Dhariwal & Nichol 2021; MonoFormer and DiT alike).

    Raises ValueError for an image that is more than `STRETCH` times as long as it is wide.
    """
    if max(pixels.shape[:2]) > STRETCH * min(pixels.shape[:2]):
        raise ValueError(f"{pixels.shape[1]} x {pixels.shape[0]} pixels are too long for their width")
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    found = np.asarray(image).reshape(image.height, image.width, -1)
    top, left = ((side - size) // 2 for side in found.shape[:2])
    return found[top : top + size, left : left + size]


def pixels_of(
    example: Example, shape: tuple[int, int, int]
) -> UInt8[np.ndarray, "h w C"] | Float16[np.ndarray, "h w C"]:
    """The centre of an example's image, `shape` (size, size, C), or its moments, float16. Raises BadRow."""
    if shape[2] not in PICTURES:
        return moments_of(example.image, shape, example.where)
    return fitted(example.image, example.where, shape[2], lambda pixels: crop(pixels, shape[0]))


def fitted(image: epath.Path | bytes | None, where: str, channels: int, fit: Callable[[np.ndarray], Any]) -> Any:
    """What `fit` makes of the pixels [h, w, channels] of an image, where it may raise ValueError. Raises BadRow."""
    try:
        if image is None:
            raise FileNotFoundError
        pixels = read_image(image, channels=channels)
    except FileNotFoundError as error:
        raise BadRow("the image is missing", where, image or "") from error
    except (ValueError, OSError) as error:
        raise BadRow("the image cannot be read", where, error) from error
    try:
        return fit(pixels)
    except ValueError as error:
        raise BadRow("the image is too narrow", where, error) from error


class _Pictures(ExampleTask):
    """Rows of captions and images; subclasses say how the text segment is put together.

    size       height and width of the images, `channels` 3 (RGB), 1 (grey), or as many as moments of latents have
    length     tokens of the text segment, with its two special ones
    text       name of the text that is the caption; `phrase` is what is made of it ("a photo of {}")
    too_long   what happens to captions with more: `cut` (their beginning is used) or `skip` (they are bad rows)
    records    a folder of shards, and `held_out` rows for "test": see `ExampleTask`
    """

    draws = 1

    def __init__(
        self,
        codec: Any,
        size: int,
        length: int,
        *,
        folder: str | os.PathLike[str] = "",
        channels: int = 3,
        patch: int = 2,
        image_mode: str = "bidirectional",
        too_long: str = "cut",
        text: str = "caption",
        phrase: str = "{}",
        records: str | os.PathLike[str] = "",
        held_out: int = 0,
    ):
        super().__init__(records=records, held_out=held_out)
        if too_long not in ("cut", "skip"):
            raise ValueError(f"too_long={too_long!r} is unknown: use cut or skip")
        check_channels(channels)
        if length < 3:
            raise ValueError(f"length={length} is not possible: give a length of at least 3 tokens")
        check_phrase(phrase)
        self.folder, self.codec, self.room, self.too_long = folder, codec, length, too_long
        self.text, self.phrase = text, phrase
        self.image_shape = (size, size, channels)
        self._image = Segment("image", "image", image_tokens(size, size, patch), image_mode)

    def open(self) -> Any:
        """The folder's rows."""
        return Lines(given(self.folder, "folder", self.name))

    def read(self, split: str, index: int) -> dict[str, np.ndarray]:
        """The row's `image` uint8 [size, size, C], `ids` [length] of its text and how many they are, `used`.

        Raises BadRow.
        """
        example = self.example(split, index)
        ids = self._encode(self.phrase.format(caption_of(example.told, example.where, self.text)), example.where)
        filled = np.full(self.room, self.codec.pad, np.int32)
        filled[: len(ids)] = ids
        return self._image_of(example) | {"ids": filled, "used": np.asarray(len(ids))}

    def blank(self) -> dict[str, np.ndarray]:
        """Arrays of the same shapes for a row that was refused."""
        none = np.zeros(self.room, np.int32)
        return {"image": blank_image(self.image_shape), "ids": none, "used": np.asarray(0)}

    def _image_of(self, example: Example) -> dict[str, np.ndarray]:
        if self.image_shape[2] not in PICTURES:
            return {"image": moments_of(example.image, self.image_shape, example.where)}
        return fitted(example.image, example.where, self.image_shape[2], self.fit)

    def fit(self, pixels: UInt8[np.ndarray, "h w C"]) -> dict[str, np.ndarray]:
        """The array `image` of the task's shape. Raises ValueError for an image that is too narrow."""
        return {"image": crop(pixels, self.image_shape[0])}

    def _encode(self, caption: str, where: str) -> list[int]:
        """Ids of the text segment: its first token, the caption, its last token."""
        room, most = self.room - 2, CHARACTERS * self.room
        if len(caption) > ENDLESS:
            raise BadRow("the caption has no end", where, f"{len(caption):,} characters")
        try:  # a long text is cut before it costs anything
            words = self.codec.encode(caption[:most])
        except ValueError as error:
            raise BadRow("the caption cannot be encoded", where, error) from error
        whole = len(words) <= room and len(caption) <= most
        if not whole and self.too_long == "skip":
            raise BadRow("the caption is too long", where, f"{len(caption):,} characters")
        return self.frame(list(words[:room]), whole)

    def frame(self, words: list[int], whole: bool) -> list[int]:
        """The text segment's ids around those of the caption, which is not `whole` when it was cut."""
        raise NotImplementedError

    def _images(self, extra: dict[str, np.ndarray]) -> ImageField:
        return image_field(extra["image"])


def blank_image(shape: tuple[int, int, int]) -> np.ndarray:
    """Zeros instead of what `pixels_of` gives."""
    return np.zeros(shape, np.uint8 if shape[2] in PICTURES else np.float16)


def image_field(values: np.ndarray) -> ImageField:
    """Pixels in [-1, 1], or moments as they are; float32."""
    scaled = values.astype(np.float32)
    return ImageField(scaled / 127.5 - 1 if values.dtype == np.uint8 else scaled)


def check_channels(channels: int) -> None:
    """Raises ValueError for channels that neither pictures nor moments have."""
    if channels not in PICTURES and (channels < 4 or channels % 2):
        raise ValueError(
            f"channels={channels} is not possible: give 1 or 3, or those of moments of latents, twice the autoencoder's"
        )


def check_phrase(phrase: str) -> None:
    """Raises ValueError for a phrase without one place for the words."""
    rest = phrase.replace("{}", "", 1)
    if phrase == rest or set("{}") & set(rest):
        raise ValueError(f"phrase={phrase!r} has not one place for the words: write {{}} once: 'a photo of {{}}'")


class CaptionToImage(_Pictures):
    """Caption -> image: prompt(text) = <s> words <|im_start|>, image in [-1, 1], tail(text) = <|im_end|> </s>.

    The words are dropped with probability `drop` in training. There is no text loss. With `newline` a line break stands
    before </s>, two tokens, as in MonoFormer's data (nothing sees it).
    """

    name = "picture_caption_to_image"

    def __init__(self, codec, size, length, *, drop: float = 0.1, newline: bool = False, **options: Any):
        super().__init__(codec, size, length, **options)
        self.drop, self._newline = drop, newline
        tail = Segment("tail", "text", 4 if newline else 2)
        self.segments = (Segment("prompt", "text", length), self._image, tail)

    @functools.cached_property
    def _tail(self) -> TextTable:
        return tail_table(self.codec, self._newline)

    def frame(self, words: list[int], whole: bool) -> list[int]:
        """<s> words <|im_start|>."""
        return [self.codec.bos, *words, self.codec.image_start]

    def build(
        self, split: str, index: np.ndarray, uniforms: np.ndarray | None, extra: dict[str, np.ndarray]
    ) -> dict[str, Field]:
        """Fields of the rows: the uniform number is drop."""
        ids, used = extra["ids"], extra["used"]
        if uniforms is not None:
            dropped = uniforms[:, 0] < self.drop
            ids, used = np.where(dropped[:, None], self.encode_prompt().ids, ids), np.where(dropped, 2, used)
        valid = np.arange(self.room) < used[:, None]
        prompt = TokenField(ids, valid, np.zeros_like(valid))
        return {"prompt": prompt, "image": self._images(extra), "tail": self._tail.take(np.zeros(len(index), np.int64))}

    def encode_prompt(self, words: str = "") -> TokenField:
        """Field `prompt` [1, N] of any words; without words the empty prompt, for guidance.

        Raises ValueError if the words have unknown characters or do not fit into the segment.
        """
        ids = self.frame(self.codec.encode(words) if words else [], True)
        return prompt_field(words, ids, self.room, self.codec.pad)


class ImageToCaption(_Pictures):
    """Image -> caption: head(text) = <s> <|im_start|>, image in [-1, 1], caption(text) = <|im_end|> caption </s>.

    The loss is on the words and </s>, which a caption that was cut does not have.
    """

    name = "picture_image_to_caption"
    draws = 0
    targets = frozenset({"caption"})

    def __init__(self, codec, size, length, **options: Any):
        super().__init__(codec, size, length, **options)
        self.segments = (Segment("head", "text", 2), self._image, Segment("caption", "text", length))
        self._head = text_table([[([codec.bos, codec.image_start], False)]], codec.pad)

    def frame(self, words: list[int], whole: bool) -> list[int]:
        """<|im_end|> words </s>."""
        return [self.codec.image_end, *words, *([self.codec.eos] if whole else [])]

    def build(
        self, split: str, index: np.ndarray, uniforms: np.ndarray | None, extra: dict[str, np.ndarray]
    ) -> dict[str, Field]:
        """Fields of the rows; nothing is random."""
        valid = np.arange(self.room) < extra["used"][:, None]
        caption = TokenField(extra["ids"], valid, valid & (np.arange(self.room) > 0))
        head = self._head.take(np.zeros(len(index), np.int64))
        return {"head": head, "image": self._images(extra), "caption": caption}

    def fixed_texts(self) -> dict[str, TokenField]:
        """Fields [1, N] that are the same in every row and come before the image."""
        return {"head": self._head.take(np.zeros(1, np.int64))}

    def encode_prompt(self, words: str = "") -> TokenField:
        """Field `caption` [1, N] as far as it is given: <|im_end|> and the first words, to be continued.

        Raises ValueError if the words have unknown characters or do not fit into the segment.
        """
        ids = self.frame(self.codec.encode(words) if words else [], False)
        return prompt_field(words, ids, self.room, self.codec.pad)
