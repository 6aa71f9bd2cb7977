"""Text codecs: words <-> token ids, on the host.

Every codec is a host link (`codecs/chain.py`) and has `vocab_size`, the ids of its special tokens
`pad, image, image_start, image_end, bos, eos`, `encode(text) -> ids` (adds no bos or eos), `decode(ids) -> text` (skips
special tokens, stops nowhere) and `fingerprint()`, which changes when any id would mean something else.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
from collections.abc import Iterable
from typing import Any, ClassVar

from etils import epath

from src.common.files.paths import read_bounded
from src.common.files.store import cache_folder, write_whole
from src.common.tree import listed
from src.interfaces import FieldSpec

MODEL_BYTES = 64 << 20  # Llama's has 0.5 MB, the largest published ones about 5
SPECIALS = ("<PAD>", "<image>", "<|im_start|>", "<|im_end|>")


class SentencePiece:
    """A sentencepiece model with four special tokens appended after its own pieces (MonoFormer's order).

    With a model of n pieces: `pad` n, `image` n+1, `image_start` n+2, `image_end` n+3; `vocab_size` n+4;
    `bos`, `eos` and unk are the model's own (1, 2, 0 in Llama's and ours).

    path           the model's file; without one `fit` learns a model from texts
    vocab_size     of a model that is learned: its own pieces, without the four special tokens
    folder         where it is kept; "": the user's cache
    byte_fallback  of a model that is learned: characters that the texts lack become the bytes of their UTF-8, which
                   are 256 of its pieces
    reserved       rows of the vocabulary between the pieces and the special tokens: words that weights have and the
                   model lacks; no text becomes one of them

    Raises FileNotFoundError if there is no file at `path`, ValueError if it is no sentencepiece model, has a piece that
    is not UTF-8, or `reserved` is negative.
    """

    where: ClassVar[str] = "host"
    shape: ClassVar[tuple[int, ...]] = ()
    learns: ClassVar[str] = "texts"

    def __init__(
        self,
        path: str | os.PathLike = "",
        vocab_size: int = 200,
        folder: str | os.PathLike = "",
        byte_fallback: bool = False,
        reserved: int = 0,
    ):
        self._wanted = vocab_size, folder or os.path.join(cache_folder(), "tokenizers"), byte_fallback
        self.reserved = reserved
        if os.fspath(path):
            self._open(path)

    @property
    def unfitted(self) -> bool:
        """Whether the model has to be learned before the first use."""
        return "vocab_size" not in self.__dict__

    def fit(self, texts: Iterable[str]) -> SentencePiece:
        """Learns the model at the first time, and else reads it from `folder`; gives the codec itself.

        Raises OSError where the folder cannot be written.
        """
        size, folder, byte_fallback = self._wanted
        try:
            self._open(learned(texts, size, folder, byte_fallback))
        except OSError as error:
            raise OSError(
                f"the tokenizer cannot be kept in {folder} ({error}); set XDG_CACHE_HOME to a writable folder"
            ) from error
        return self

    def _open(self, path: str | os.PathLike) -> None:
        self._read(path)
        self._number(self._model.get_piece_size(), self._model.bos_id(), self._model.eos_id(), self._model.unk_id())

    def _number(self, pieces: int, bos: int, eos: int, unk: int) -> None:
        if self.reserved < 0:
            raise ValueError(f"a text codec with reserved={self.reserved} is not possible: give 0 or more rows")
        first = pieces + self.reserved
        self.pad, self.image, self.image_start, self.image_end = range(first, first + len(SPECIALS))
        self.pieces, self.bos, self.eos, self.unk = pieces, bos, eos, unk
        self.vocab_size = first + len(SPECIALS)
        self.spec = FieldSpec(vocab=self.vocab_size)

    def _read(self, path: str | os.PathLike) -> None:
        import sentencepiece

        if not epath.Path(path).exists():
            raise FileNotFoundError(f"tokenizer {str(path)!r} does not exist: give the path of a sentencepiece model")
        proto = read_bounded(path, MODEL_BYTES, "tokenizer")
        model = sentencepiece.SentencePieceProcessor()
        try:
            loaded = model.LoadFromSerializedProto(proto)
        except (RuntimeError, ValueError):  # ValueError: its own message has bytes that are no text
            loaded = False
        if not loaded or model.bos_id() < 0 or model.eos_id() < 0:
            raise ValueError(
                f"tokenizer {str(path)!r} is not a sentencepiece model with <s> and </s>: is the file whole, "
                "and not a Git LFS pointer?"
            )
        if wrong := [number for number in range(model.get_piece_size()) if not _readable(model, number)]:
            raise ValueError(
                f"tokenizer {str(path)!r} has pieces that are not UTF-8 (numbers {listed(wrong)}), and texts that have "
                "them could not be read: give another file"
            )
        self._proto, self._model = proto, model

    def encode(self, text: str) -> list[int]:
        """Ids of the pieces of `text`; the first word gets the model's word-start piece, as after any special token.

        Raises ValueError if the text has characters that the model lacks, or half a surrogate pair.
        """
        try:
            ids = self._model.encode(text)
        except RuntimeError as error:  # what sentencepiece says of text that is no UTF-8
            raise ValueError(f"text {text!a} has half a surrogate pair: write it anew as UTF-8") from error
        if self.unk in ids:
            pieces = self._model.encode(text, out_type=str)
            unknown = sorted({c for i, piece in zip(ids, pieces, strict=True) if i == self.unk for c in piece})
            raise ValueError(
                f"text {text!r} has characters that the tokenizer does not know: {' '.join(map(repr, unknown))}; "
                "leave them out, give a tokenizer that has them, or let one with bytes be learned "
                "(byte_fallback=True of the codec, and no path)"
            )
        return list(ids)

    def decode(self, ids: Iterable) -> str:
        """Text of `ids`; special tokens and ids outside the vocabulary are skipped."""
        skipped = (self.bos, self.eos, self.unk)
        return self._model.decode([int(i) for i in ids if 0 <= int(i) < self.pieces and int(i) not in skipped])

    def fingerprint(self) -> str:
        """Sixteen hex digits of the model's bytes, the order of the special tokens, and the rows before them."""
        before = [str(self.reserved).encode()] if self.reserved else []
        return digest(self._proto, *(s.encode() for s in SPECIALS), *before)


class Llama(SentencePiece):
    """Llama's tokenizer file, opened at the first text only: its ids are known before (unk 0, <s> 1, </s> 2).

    A model can so be built, counted and compiled where the file is not. Raises, at the first text, what `SentencePiece`
    raises, and ValueError when the file has another number of pieces, or other ids of these three.
    """

    ids: ClassVar[tuple[int, int, int]] = (1, 2, 0)  # of <s>, </s> and unk

    def __init__(self, path: str | os.PathLike, pieces: int = 32_000, reserved: int = 0):
        self.path, self.reserved = path, reserved
        self._number(pieces, *self.ids)

    def __getattr__(self, name: str) -> Any:
        if name not in ("_model", "_proto"):
            raise AttributeError(name)
        self._read(self.path)
        if (found := self._model.get_piece_size()) != self.pieces:
            del self._model, self._proto  # so that the next text is refused, too
            raise ValueError(
                f"tokenizer {str(self.path)!r} has {found} pieces, the config says {self.pieces}"
                ": give the tokenizer of the weights, or set its pieces"
            )
        if (ids := (self._model.bos_id(), self._model.eos_id(), self._model.unk_id())) != self.ids:
            del self._model, self._proto
            raise ValueError(
                f"tokenizer {str(self.path)!r} has the pieces {listed(ids)} as <s>, </s> and unknown, and Llama's has "
                f"{listed(self.ids)}: read it by text:SentencePiece, which takes them from the file"
            )
        return self.__dict__[name]


class Bytes:
    """UTF-8 bytes 0..255, then `pad, image, image_start, image_end, bos, eos` = 256..261; needs no file."""

    where: ClassVar[str] = "host"
    shape: ClassVar[tuple[int, ...]] = ()

    pad, image, image_start, image_end, bos, eos = range(256, 262)
    vocab_size = 262
    spec: ClassVar[FieldSpec] = FieldSpec(vocab=vocab_size)

    def encode(self, text: str) -> list[int]:
        """One id per UTF-8 byte."""
        return list(text.encode())

    def decode(self, ids: Iterable) -> str:
        """Text of the byte ids; special tokens are skipped, bytes that are not UTF-8 become U+FFFD."""
        return bytes(int(i) for i in ids if 0 <= int(i) < 256).decode(errors="replace")

    def fingerprint(self) -> str:
        """Sixteen hex digits, always the same."""
        return digest(b"bytes", *(s.encode() for s in SPECIALS))


def learned(
    texts: Iterable[str], vocab_size: int, folder: str | os.PathLike, byte_fallback: bool = False
) -> epath.Path:
    """The file of a model trained on `texts`, made at its first use.

    Its name contains a hash of the texts and settings, so that other texts never find an old model.
    """
    texts = list(texts)
    settings = "\0".join([*texts, str(vocab_size), str(byte_fallback)])
    name = f"sentencepiece-{hashlib.sha256(settings.encode()).hexdigest()[:16]}.model"
    path = epath.Path(folder) / name
    if not path.exists():
        train_sentencepiece(texts, vocab_size, path, byte_fallback)
    return path


def train_sentencepiece(
    texts: Iterable[str], vocab_size: int, path: str | os.PathLike, byte_fallback: bool = False
) -> None:
    """Trains a BPE model on `texts` and writes it to `path` atomically.

    Equal texts and settings give equal bytes. `vocab_size` is an upper bound: a small language has fewer merges.
    Nothing is normalized except white space. With `byte_fallback` unknown characters become UTF-8 byte pieces.

    Raises ValueError if `vocab_size` is smaller than the number of characters.
    """
    import sentencepiece

    model = io.BytesIO()
    train = functools.partial(
        sentencepiece.SentencePieceTrainer.train,
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        byte_fallback=byte_fallback,
        character_coverage=1.0,
        normalization_rule_name="identity",
        shuffle_input_sentence=False,
        num_threads=1,
        minloglevel=3,
    )
    try:
        train(sentence_iterator=iter(texts))
    except RuntimeError as error:
        raise ValueError(
            f"no tokenizer of {vocab_size} pieces can be trained on these texts, give a larger vocab_size "
            f"(sentencepiece: {str(error).strip().splitlines()[-1]})"
        ) from error
    write_whole(path, model.getvalue())


def _readable(model: Any, number: int) -> bool:
    try:
        model.id_to_piece(number)
    except UnicodeDecodeError:
        return False
    return True


def digest(*parts: bytes) -> str:
    """Sixteen hex digits of some bytes, for fingerprints."""
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
