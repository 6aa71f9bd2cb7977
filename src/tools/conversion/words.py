"""Which rows of a vocabulary are pieces of its tokenizer, words that others added, and our special tokens.

The special tokens are the last four rows. Words of others lie between them and the pieces: their rows are kept, and no
text becomes one of them (`reserved` of the text codec).
"""

from __future__ import annotations

import os
from typing import NamedTuple

from etils import epath

from src.codecs.text import SPECIALS, SentencePiece
from src.common.files.paths import shown
from src.models.pretrained.hf_config import read_config
from src.tools.conversion.tokenizer import json_pieces, loose_words, words_by_id


class VocabularyRows(NamedTuple):
    """new       rows to add
    pieces    of the tokenizer, None where there is none
    reserved  rows between the pieces and the special tokens
    special   the last four rows are the special tokens
    """

    new: int
    pieces: int | None
    reserved: int
    special: bool


def pieces_of(folder: str | os.PathLike[str]) -> int | None:
    """Pieces of the sentencepiece model in a folder, else tokens of its tokenizer.json, None where there is neither."""
    try:
        return SentencePiece(epath.Path(folder) / "tokenizer.model").pieces
    except (OSError, ValueError, ImportError):  # no tokenizer to compare with
        return json_pieces(folder)


def has_special_tokens(folder: str | os.PathLike[str], rows: int, pieces: int | None, trained: bool) -> bool:
    """Whether the last of so many rows are the special tokens: `trained` weights are MonoFormer's, of others the
    tokenizer's files have to say so."""
    own = rows - len(SPECIALS)
    named = words_by_id(folder)
    return own >= (pieces or 0) and (trained or all(named.get(own + i) == word for i, word in enumerate(SPECIALS)))


def words_of(folder: epath.Path, wanted: int | None = None) -> VocabularyRows:
    """What the rows of published weights are, and how many are to be added; `wanted`: so many, where that was said.

    Raises as `read_config` does, and ValueError, in one sentence, where the tokenizer has more pieces than there are
    rows, where the special tokens are other rows than the last, and where nothing says whether the last four are they.
    """
    config, pieces = read_config(folder), pieces_of(folder)
    rows, count, trained = config.vocab_size, len(SPECIALS), config.image is not None
    if pieces is not None and rows < pieces and wanted is None:
        raise _too_many(folder, pieces, rows, 0)
    have = has_special_tokens(folder, rows, pieces, trained)
    new = (0 if have else _new(folder, rows, pieces)) if wanted is None else wanted
    special = new >= count or (have and not new) or (new == 0 and rows - count == pieces)
    own = rows + new - (count if special else 0)
    if pieces is not None and own < pieces:
        raise _too_many(folder, pieces, rows, rows + new - own)
    return VocabularyRows(new, pieces, own - pieces if pieces is not None and special else 0, special)


def _new(folder: epath.Path, rows: int, pieces: int | None) -> int:
    """The rows that weights without the special tokens get."""
    named = words_by_id(folder)
    where = {word: number for number, word in named.items() if word in SPECIALS}
    if len(where) == len(SPECIALS):
        raise ValueError(
            f"the tokenizer in {shown(folder)} has {where}, and here {', '.join(SPECIALS)} are the last of the {rows} "
            f"rows, in this order: give --new_words={len(SPECIALS)} to add rows of their own"
        )
    foreign = [word for number, word in named.items() if number >= (pieces or 0)] + loose_words(folder)
    if rows - len(SPECIALS) == pieces and sorted(foreign) == sorted(SPECIALS):
        return 0
    if rows - len(SPECIALS) == pieces and not foreign:
        raise ValueError(
            f"the weights in {shown(folder)} have {rows} rows and their tokenizer {pieces} pieces, and no file names "
            f"the last {len(SPECIALS)}: give --new_words=0 if they are {', '.join(SPECIALS)}, else "
            f"--new_words={len(SPECIALS)}"
        )
    return len(SPECIALS)


def _too_many(folder: epath.Path, pieces: int, rows: int, special: int) -> ValueError:
    last = f", the last {special} of them for special tokens" if special else ""
    return ValueError(
        f"the tokenizer in {shown(folder)} has {pieces} pieces, and config.json has vocab_size={rows}{last}: give the "
        "tokenizer that belongs to the weights, or --new_words"
    )
