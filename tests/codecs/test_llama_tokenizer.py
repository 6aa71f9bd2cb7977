"""Ids as Llama's tokenizer gives them, from a model of its format: byte pieces, word starts after special tokens.

Expected ids are those of MonoFormer's strings under the published fast tokenizer, where every piece of text between two
special tokens is tokenised by itself.
"""

import io

import pytest
import sentencepiece

from src.codecs.text import Llama, SentencePiece

TEXTS = ["Please generate an image of a goldfish.", "an image of a great white shark.", "12 goldfish"] * 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Llama-2's settings at 340 pieces."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=file, model_type="bpe", vocab_size=340, byte_fallback=True,
        hard_vocab_limit=False, split_digits=True, allow_whitespace_only_pieces=True, add_dummy_prefix=True,
        remove_extra_whitespaces=False, normalization_rule_name="identity", unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        character_coverage=1.0, num_threads=1, minloglevel=3,
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(file.getvalue())
    return path


def test_ids_are_llamas(model):
    raw = sentencepiece.SentencePieceProcessor(model_file=str(model))
    start = raw.piece_to_id("▁")
    codec = Llama(model, pieces=raw.get_piece_size())
    assert (codec.unk, codec.bos, codec.eos, codec.pad) == (0, 1, 2, raw.get_piece_size())
    assert [raw.id_to_piece(i) for i in (0, 1, 2, 3, 13, 258)] == ["<unk>", "<s>", "</s>", "<0x00>", "<0x0A>", "<0xFF>"]
    assert start > 258  # 29871 in the real file
    # "...<|im_end|>\n</s>": the word start, the line break as a byte
    assert codec.encode("\n") == [start, 13]
    assert codec.encode("") == []
    # After <s> and after any other special token the first word has its start.
    assert [raw.id_to_piece(i) for i in codec.encode("goldfish")] == ["▁goldfish"]
    assert codec.encode("12") == [start, *(raw.piece_to_id(digit) for digit in "12")]  # digits stand alone
    # What is not in the vocabulary is bytes of UTF-8, whose ids are three more.
    assert codec.encode("é") == [start, *(3 + byte for byte in "é".encode())]
    assert codec.encode("an  image") == [*codec.encode("an"), start, *codec.encode("image")]  # no space is lost
    # Text that looks like a special token is text.
    for text in ("<s>", "</s>", "<|im_start|>", "<PAD>", "<0x0A>"):
        ids = codec.encode(text)
        assert (
            not {codec.bos, codec.eos, codec.unk, 13} & set(ids) and max(ids) < codec.pad and codec.decode(ids) == text
        )


def test_other_ids_of_the_special_pieces_are_refused(tmp_path):
    """As Gemma numbers them: its piece 1, the `<s>` of Llama, ends a text."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=file, model_type="bpe", vocab_size=340, byte_fallback=True,
        hard_vocab_limit=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3, num_threads=1, minloglevel=3,
    )  # fmt: skip
    (tmp_path / "tokenizer.model").write_bytes(file.getvalue())
    whole = SentencePiece(tmp_path / "tokenizer.model")
    assert (whole.bos, whole.eos, whole.unk) == (2, 1, 3)
    codec = Llama(tmp_path / "tokenizer.model", pieces=whole.pieces)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"has the pieces 2, 1, 3 as <s>, .*text:SentencePiece"):
            codec.encode("a")


def test_any_text_comes_back(model):
    codec = SentencePiece(model)
    for text in ("an image of a goldfish.", " two  spaces ", "line\nbreak\ttab", "naïve 金魚 🐟", ""):
        ids = codec.encode(text)
        assert codec.decode([codec.bos, *ids, codec.image_end, codec.eos, codec.pad]) == text
        assert not {codec.bos, codec.eos, codec.unk} & set(ids)
