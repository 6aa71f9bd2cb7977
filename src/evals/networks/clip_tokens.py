"""CLIP's tokenizer: byte-level byte-pair encoding of lower-case words (Radford et al. 2021; Sennrich et al. 2016).

It gives the ids of transformers' `CLIPTokenizer`, from its files: `tokenizer.json`, or `vocab.json` with `merges.txt`.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int

from src.common.files.paths import read_bounded, shown
from src.common.files.strict_json import parse_json, read_json

BEGIN, END, LAST = "<|startoftext|>", "<|endoftext|>", "</w>"
SPECIAL = re.compile(f"({re.escape(BEGIN)}|{re.escape(END)})")
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
BYTES = 32 << 20  # of a file of the tokenizer
PIECES = 1 << 14  # words that are remembered
Merges = Mapping[tuple[str, str], int]


class ClipTokens:
    """Texts as rows of ids: the begin, the words, the end, and the end again as padding.

    vocab    ids of the pieces; those of whole words end in `</w>`
    merges   pairs of pieces, the first of them joined first

    Raises ValueError for a vocabulary without the marks of begin and end.
    """

    def __init__(self, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]):
        if missing := [mark for mark in (BEGIN, END) if mark not in vocab]:
            raise ValueError(
                f"the vocabulary of CLIP has no {missing[0]}: give the tokenizer that belongs to the weights"
            )
        self.vocab, self.begin, self.end = dict(vocab), vocab[BEGIN], vocab[END]
        ranks = {pair: rank for rank, pair in enumerate(merges)}
        self._pieces = functools.lru_cache(PIECES)(lambda word: joined(word, ranks))

    def rows(self, texts: Sequence[str], length: int) -> Int[np.ndarray, "n {length}"]:
        """The ids of texts; of a text that is too long the first `length` - 2."""
        found = np.full((len(texts), length), self.end, np.int32)
        for row, text in zip(found, texts, strict=True):
            ids = [self.begin, *self.encode(text)[: length - 2]]
            row[: len(ids)] = ids
        return found

    def encode(self, text: str) -> list[int]:
        """The ids of a text without begin and end. What the vocabulary lacks has the id of the end, as published."""
        ids = []
        for part in SPECIAL.split(text):
            if SPECIAL.fullmatch(part):
                ids.append(self.vocab[part])
                continue
            for word in words(part):
                letters = "".join(LETTERS[byte] for byte in word.encode())
                ids += [self.vocab.get(piece, self.end) for piece in self._pieces(letters)]
        return ids


def words(text: str) -> list[str]:
    """What is encoded by itself: runs of letters, single digits, runs of other signs, the ends of contractions; lower
    case, composed (NFC), without white space."""
    text = "".join(character.lower() for character in unicodedata.normalize("NFC", text))
    found, at = [], 0
    while at < len(text):
        kind = _kind(text[at])
        short = next((c for c in CONTRACTIONS if text.startswith(c, at)), "") if text[at] == "'" else ""
        end = at + max(len(short), 1)
        if not short and kind in "LO":
            while end < len(text) and _kind(text[end]) == kind:
                end += 1
        if kind != "Z":
            found.append(text[at:end])
        at = end
    return found


def joined(word: str, ranks: Merges) -> tuple[str, ...]:
    """The pieces of a word: of the neighbours that may be joined the pair of the lowest rank is, everywhere, until none
    may."""
    pieces = [*word[:-1], word[-1] + LAST]
    while len(pieces) > 1:
        pairs = set(itertools.pairwise(pieces))
        first = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
        if first not in ranks:
            break
        after: list[str] = []
        at = 0
        while at < len(pieces):
            here = tuple(pieces[at : at + 2]) == first
            after.append(pieces[at] + pieces[at + 1] if here else pieces[at])
            at += 1 + here
        pieces = after
    return tuple(pieces)


def read_tokens(folder: str | os.PathLike[str]) -> ClipTokens:
    """The tokenizer in a folder. Raises FileNotFoundError, and ValueError, in one sentence, for files that are none."""
    place = epath.Path(folder)
    if (place / "vocab.json").exists() and (place / "merges.txt").exists():
        vocab, where = read_json(place / "vocab.json", limit=BYTES, what="vocabulary"), place / "merges.txt"
        lines = read_bounded(where, BYTES, "file of merges").decode("utf-8", "replace").split("\n")
        pairs = [line.split() for line in lines if line.strip() and not line.startswith("#version")]
    elif (where := place / "tokenizer.json").exists():
        fields = parse_json(read_bounded(where, BYTES, "tokenizer"), f"the tokenizer {shown(where)}")
        model = fields.get("model") if isinstance(fields, dict) else None
        vocab, pairs = (model.get("vocab"), model.get("merges")) if isinstance(model, dict) else (None, None)
        pairs = [pair.split() if isinstance(pair, str) else pair for pair in pairs] if isinstance(pairs, list) else None
    else:
        raise FileNotFoundError(
            f"the folder {shown(place)} has no tokenizer: add tokenizer.json, or vocab.json and merges.txt, of the CLIP"
        )
    if not _is_vocab(vocab) or pairs is None or any(not _is_pair(pair) for pair in pairs):
        raise ValueError(
            f"{shown(where)} is no tokenizer of CLIP (pieces with ids, and pairs of pieces): fetch it anew"
        )
    return ClipTokens(vocab, [tuple(pair) for pair in pairs])


def _is_vocab(value: Any) -> bool:
    return isinstance(value, dict) and all(type(number) is int and number >= 0 for number in value.values())


def _is_pair(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(isinstance(piece, str) for piece in value)


def _letters() -> list[str]:
    """A printable character for each byte: itself where it is one, else one behind the first 256 (GPT-2's table)."""
    own = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in own else chr(next(others)) for byte in range(256)]


LETTERS = _letters()


def _kind(character: str) -> str:
    """L: letter, N: digit, Z: white space, O: any other sign."""
    category = unicodedata.category(character)[0]
    if category in "LNZ":
        return category
    return "Z" if character in "\t\n\v\f\r\x85" else "O"
