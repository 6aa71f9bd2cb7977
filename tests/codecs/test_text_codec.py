"""Text codecs: ids of special tokens, round trips, and the trained model's file."""

import pickle

import pytest

from configs import common
from src.codecs.text import Bytes, Llama, SentencePiece, learned, train_sentencepiece

TEXTS = ["a handwritten seven", "three plus four is seven", "a handwritten 3", "seven left of two"] * 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return SentencePiece(vocab_size=60, folder=tmp_path_factory.mktemp("tokenizer")).fit(TEXTS)


def test_special_ids_follow_the_models_own_pieces(model):
    own = model.vocab_size - 4
    assert (model.pad, model.image, model.image_start, model.image_end) == (own, own + 1, own + 2, own + 3)
    assert (model.bos, model.eos, model.unk) == (1, 2, 0)
    assert (Bytes.pad, Bytes.bos, Bytes.eos, Bytes.vocab_size) == (256, 260, 261, 262)


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_decode_inverts_encode_and_skips_specials(kind, model):
    codec = model if kind == "sentencepiece" else Bytes()
    for text in TEXTS:
        ids = codec.encode(text)
        assert not set(ids) & {codec.bos, codec.eos, codec.pad}
        noise = [codec.bos, *ids[:2], codec.image_start, *ids[2:], codec.image_end, codec.eos, codec.pad]
        assert codec.decode(noise) == text
    # Nothing stops at eos, and ids that a padded output layer may give are harmless.
    tail = codec.encode("seven")
    assert codec.decode([codec.eos, *tail, codec.vocab_size + 5, -1]) == "seven"


def test_a_prompt_is_the_beginning_of_its_sentence(model):
    """Generation continues `encode(prompt)`, so the ids of a whole sentence must begin with those of its prompt."""
    for codec in (model, Bytes()):
        assert codec.encode("three plus four is seven")[:-1][: len(codec.encode("three plus four is"))] == codec.encode(
            "three plus four is"
        )


def test_unknown_characters_are_named(model):
    with pytest.raises(ValueError, match=r"does not know: 'Q' 'é'") as error:
        model.encode("seven Q é seven")
    assert "\n" not in str(error.value)


def test_byte_fallback_and_bytes_take_any_text(tmp_path):
    codec = SentencePiece(learned(TEXTS, 330, tmp_path, byte_fallback=True))
    for any_codec in (codec, Bytes()):
        assert any_codec.decode(any_codec.encode("seven Q é ∑ seven")) == "seven Q é ∑ seven"
    assert Bytes().decode([0x73, 0xC3]) == "s\ufffd"


def test_byte_fallback_is_an_option_of_the_codec_that_every_config_has(tmp_path):
    """As the message about unknown characters says."""
    assert common.text()["codec"] | {"name": ""} == {
        "name": "", "path": "", "vocab_size": 200, "folder": "", "byte_fallback": False
    }  # fmt: skip
    codec = SentencePiece(vocab_size=330, folder=tmp_path, byte_fallback=True).fit(TEXTS)
    assert codec.decode(codec.encode("seven Q é")) == "seven Q é"
    plain = SentencePiece(vocab_size=60, folder=tmp_path).fit(TEXTS)
    with pytest.raises(ValueError, match="byte_fallback=True of the codec"):
        plain.encode("seven Q é")


def damaged(model, old, new):
    """The file of a model with other bytes in one of its pieces."""
    whole = model.read_bytes()
    at = whole.rindex(old)
    model.write_bytes(whole[:at] + new + whole[at + len(old) :])


@pytest.mark.parametrize("piece", [b"\xc3\x28", b"\xff\xfe", b"\xed\xa0"])
def test_a_piece_that_is_no_utf8_is_refused_when_the_file_is_read(piece, tmp_path):
    """Before, such a file was accepted, and the first text that had the piece gave a UnicodeDecodeError."""
    path = tmp_path / "t.model"
    train_sentencepiece([*TEXTS, "a ß"], 60, path)
    damaged(path, "ß".encode(), piece)
    for open_file in (SentencePiece, lambda path: Llama(path).encode("seven")):
        with pytest.raises(ValueError, match=r"t\.model' has pieces that are not UTF-8 \(numbers \d+\)") as error:
            open_file(path)
        assert not isinstance(error.value, UnicodeDecodeError) and "\n" not in str(error.value)


def test_a_file_that_was_refused_once_is_refused_again(tmp_path):
    train_sentencepiece(TEXTS, 60, tmp_path / "t.model")
    codec = Llama(tmp_path / "t.model", pieces=61)
    for _ in range(2):
        with pytest.raises(ValueError, match="the config says 61"):
            codec.encode("seven")


def test_reserved_rows_lie_between_the_pieces_and_the_special_tokens(tmp_path):
    """Words that published weights have and their tokenizer lacks: no text becomes one, and none becomes text."""
    path = tmp_path / "t.model"
    train_sentencepiece(TEXTS, 60, path)
    plain = SentencePiece(path)
    for codec in (SentencePiece(path, reserved=5), Llama(path, pieces=plain.pieces, reserved=5)):
        assert (codec.pad, codec.image_end, codec.vocab_size) == (plain.pad + 5, plain.image_end + 5, plain.pad + 9)
        assert codec.encode("seven left") == plain.encode("seven left")
        assert codec.decode([*codec.encode("seven"), *range(plain.pieces, codec.vocab_size)]) == "seven"
        assert codec.fingerprint() != plain.fingerprint() and codec.spec.vocab == codec.vocab_size
    with pytest.raises(ValueError, match="reserved=-1 is not possible"):
        Llama(path, reserved=-1)


def test_training_is_deterministic_and_atomic(tmp_path, capfd):
    first, second = tmp_path / "a" / "first.model", tmp_path / "second.model"
    train_sentencepiece(TEXTS, 60, first)
    train_sentencepiece(iter(TEXTS), 60, second)
    assert first.read_bytes() == second.read_bytes()
    assert [p.name for p in first.parent.iterdir()] == ["first.model"]
    out = capfd.readouterr()
    assert out.out + out.err == ""


def test_cache_is_reused_only_for_equal_texts_and_settings(tmp_path, monkeypatch):
    codec = SentencePiece(vocab_size=60, folder=tmp_path).fit(TEXTS)
    other = SentencePiece(vocab_size=50, folder=tmp_path).fit(TEXTS)
    more = SentencePiece(vocab_size=60, folder=tmp_path).fit([*TEXTS, "nine"])
    assert len(list(tmp_path.iterdir())) == 3
    assert len({codec.fingerprint(), other.fingerprint(), more.fingerprint(), Bytes().fingerprint()}) == 4
    monkeypatch.setattr("src.codecs.text.train_sentencepiece", None)  # a second training would fail
    assert SentencePiece(vocab_size=60, folder=tmp_path).fit(TEXTS).fingerprint() == codec.fingerprint()


def test_bad_files_are_refused_in_one_sentence(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        SentencePiece(tmp_path / "none.model")
    pointer = tmp_path / "pointer.model"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="not a sentencepiece model") as error:
        SentencePiece(pointer)
    assert "\n" not in str(error.value)
    train_sentencepiece(TEXTS, 330, tmp_path / "bytes.model", byte_fallback=True)
    pointer.write_bytes((tmp_path / "bytes.model").read_bytes().replace(b"<0x01>", b"\xbc0x01>"))
    with pytest.raises(ValueError, match="not a sentencepiece model"):  # though the library's reason is no text
        SentencePiece(pointer)
    with pytest.raises(ValueError, match="larger vocab_size") as error:
        train_sentencepiece(TEXTS, 5, tmp_path / "small.model")
    assert "\n" not in str(error.value) and not (tmp_path / "small.model").exists()


def test_codec_travels_to_worker_processes(model):
    copy = pickle.loads(pickle.dumps(model))
    assert copy.encode("a handwritten seven") == model.encode("a handwritten seven")


def test_llama_knows_its_ids_before_it_needs_its_file(tmp_path):
    """The published MonoFormer: 32000 pieces, then <PAD>, <image>, <|im_start|>, <|im_end|>."""
    codec = Llama(tmp_path / "tokenizer.model")
    assert (codec.bos, codec.eos, codec.pad, codec.image) == (1, 2, 32000, 32001)
    assert (codec.image_start, codec.image_end, codec.vocab_size) == (32002, 32003, 32004)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        codec.encode("seven")
    train_sentencepiece(["seven left of two\n"] * 3, 300, tmp_path / "tokenizer.model", byte_fallback=True)
    with pytest.raises(ValueError, match="pieces, the config says 32000"):
        Llama(tmp_path / "tokenizer.model").encode("seven")
    true = SentencePiece(tmp_path / "tokenizer.model")
    codec = Llama(tmp_path / "tokenizer.model", pieces=true.pad)
    assert codec.encode("two\n") == true.encode("two\n") and codec.fingerprint() == true.fingerprint()
    with pytest.raises(AttributeError):
        _ = codec.nothing
