"""Words <-> ids by a `tokenizer.json` of the tokenizers library, as Llama 3, Qwen and newer Mistrals publish it.

Text is always text: what looks like a special token becomes ordinary pieces, never its id. The library is imported at
the first text.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from typing import Any, ClassVar

from src.codecs.text import SPECIALS, digest
from src.common.files.paths import read_bounded
from src.common.files.strict_json import parse_json
from src.common.tree import listed
from src.interfaces import FieldSpec

JSON_BYTES = 64 << 20  # of Llama 3's 9 MB, of Qwen's 11, of Gemma's 33


class TokenizerJson:
    """The tokens of a file, and the four special tokens of every text codec behind them (`codecs/text.py`).

    path      of the `tokenizer.json`; it is opened at the first text, so that a model can be built without it
    pieces    its tokens, those that were added included
    bos, eos  ids of tokens that begin and end a text
    reserved  rows of the vocabulary between the pieces and the special tokens, to which weights are padded

    Raises ValueError for ids that are not below `pieces`; at the first text FileNotFoundError, ImportError without the
    library, and ValueError, in one sentence, when the file is no tokenizer, has another number of tokens, or would
    leave characters out without a word.
    """

    where: ClassVar[str] = "host"
    shape: ClassVar[tuple[int, ...]] = ()

    def __init__(self, path: str | os.PathLike, pieces: int, bos: int, eos: int, reserved: int = 0):
        if reserved < 0 or not 0 <= min(bos, eos) <= max(bos, eos) < pieces:
            raise ValueError(
                f"tokenizer_json with pieces={pieces}, bos={bos}, eos={eos}, reserved={reserved} is not possible: bos"
                " and eos are tokens of the file, reserved is 0 or more"
            )
        self.path, self.pieces, self.bos, self.eos, self.reserved = path, pieces, bos, eos, reserved
        first = pieces + reserved
        self.pad, self.image, self.image_start, self.image_end = range(first, first + len(SPECIALS))
        self.vocab_size = first + len(SPECIALS)
        self.spec = FieldSpec(vocab=self.vocab_size)

    def __getattr__(self, name: str) -> Any:
        if name not in ("_model", "_special", "_unknown", "_bytes"):
            raise AttributeError(name)
        self._open()
        return self.__dict__[name]

    def _open(self) -> None:
        where, whole = f"tokenizer {os.fspath(self.path)!r}", read_bounded(self.path, JSON_BYTES, "tokenizer")
        told = plain_tokenizer(parse_json(whole, where), where, self.pieces)
        model = _read(json.dumps(told), where)
        added = [token for token in told["added_tokens"] if token.get("special")]
        special = {model.token_to_id(token["content"]) for token in added} | {self.bos, self.eos}
        self._bytes, self._unknown = whole, _unknown_of(told, model, where)
        self._model, self._special = model, frozenset(special)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without special tokens. Raises ValueError for characters that the tokenizer does not know, and
        for half a surrogate pair."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text {text!a} has half a surrogate pair: write it anew as UTF-8") from error
        ids = self._model.encode(text, add_special_tokens=False).ids
        if self._unknown in ids:
            raise ValueError(
                f"text {text!r} has characters that the tokenizer does not know: leave them out, or give another one"
            )
        if wrong := self._special & {*ids}:
            raise ValueError(f"text {text!r} becomes the special tokens {sorted(wrong)}: give another tokenizer")
        return list(ids)

    def decode(self, ids: Iterable) -> str:
        """Text of `ids`; special tokens and ids outside the vocabulary are skipped."""
        kept = [int(i) for i in ids if 0 <= int(i) < self.pieces and int(i) not in self._special]
        return self._model.decode(kept, skip_special_tokens=False)

    def fingerprint(self) -> str:
        """Sixteen hex digits of the file's bytes, the ids that begin and end a text, and the rows behind the pieces."""
        self._model  # noqa: B018, opens the file
        numbers = (self.bos, self.eos, self.reserved)
        return digest(self._bytes, *(s.encode() for s in SPECIALS), *(str(n).encode() for n in numbers))


def plain_tokenizer(told: Any, where: str, pieces: int) -> dict[str, Any]:
    """The content of a `tokenizer.json` without tokens of other ids than `pieces`, lengths and templates.

    Raises ValueError for another form, for ids or words that are there twice, and for another number of tokens.
    """
    try:
        added = [token for token in told.get("added_tokens") or [] if token["id"] < pieces]
        words = told["model"]["vocab"]
        ids = [*(words.values() if isinstance(words, dict) else range(len(words))), *(t["id"] for t in added)]
        names = [token["content"] for token in added]
        count, same = max(ids) + 1, {token["id"]: token["content"] for token in added}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{where} is no tokenizer.json: fetch it anew") from error
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or len(same) < len(added):
        raise ValueError(f"{where} adds a token twice ({listed(twice) or 'two words of one id'}): correct it")
    if count != pieces:
        raise ValueError(f"{where} has {count} tokens, the config says {pieces}: set its pieces")
    return dict(told) | {"added_tokens": added, "truncation": None, "padding": None, "post_processor": None}


def _read(text: str, where: str) -> Any:
    """The tokenizer of the library, which reads special tokens in a text as text."""
    try:
        import tokenizers
    except ImportError:
        raise ImportError(f"{where} needs the tokenizers library: pip install tokenizers") from None
    try:
        model = tokenizers.Tokenizer.from_str(text)
    except BaseException as error:  # the library's panics are no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"{where} is not read by the tokenizers library ({said}): fetch it anew") from error
    model.encode_special_tokens = True
    return model


def _unknown_of(told: dict[str, Any], model: Any, where: str) -> int | None:
    """The id of the unknown token. Raises ValueError where there is none and characters would be left out."""
    from tokenizers import pre_tokenizers

    name = told["model"].get("unk_token")
    if name is not None:
        return model.token_to_id(name)
    letters = {letter for letter in pre_tokenizers.ByteLevel.alphabet() if model.token_to_id(letter) is None}
    if letters and not told["model"].get("byte_fallback"):
        raise ValueError(
            f"{where} has no unknown token and lacks {len(letters)} of 256 bytes, so some characters would be left out:"
            " give another tokenizer"
        )
    return None
