"""A byte-level tokenizer.json against the tokenizers library itself; the parts that need no library without it."""

import json
import pickle

import pytest

from src.codecs.tokenizer_json import TokenizerJson, plain_tokenizer

TEXTS = ["Please generate an image of a goldfish.", "an image of a great white shark.", "12 goldfish"] * 4
HARD = (
    *(
        "goldfish",
        "  two  spaces\n\n\tand\r\n",
        "é ☃ 👩🏽‍🚀🏳️‍🌈",
        "שלום עולם",
        "مرحبا",
        "nul \0 inside",
        "a" * 3000,
        "\u202eright",
    ),
    *("<|im_start|>user", "<|endoftext|>", " <|im_end|>\n", "<|im_start", "<PAD><image>", "<think>x</think>", ""),
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SMALL = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": []}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A small tokenizer as Qwen's is: byte-level BPE, NFC, special tokens behind, padding and a template set."""
    library = pytest.importorskip("tokenizers")
    model = library.Tokenizer(library.models.BPE())
    model.normalizer = library.normalizers.NFC()
    model.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    model.train_from_iterator(TEXTS, trainer)
    plain = library.Tokenizer.from_str(model.to_str())
    model.add_special_tokens(list(SPECIAL))
    model.enable_padding(length=64)
    model.enable_truncation(8)
    template = library.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", model.token_to_id("<|endoftext|>"))]
    )
    model.post_processor = template
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    model.save(str(path))
    first = plain.get_vocab_size()
    return path, plain, TokenizerJson(path, pieces=first + 3, bos=first, eos=first + 2, reserved=5)


def test_ids_are_the_librarys_and_no_text_is_a_special_token(trained):
    path, plain, codec = trained
    for text in HARD:
        ids = codec.encode(text)
        assert ids == plain.encode(text).ids, text
        assert not {codec.bos, codec.eos, codec.bos + 1} & {*ids} and max(ids, default=0) < codec.pieces
        assert codec.decode([codec.bos, *ids, codec.eos, codec.pad, codec.vocab_size + 9]) == text
    assert (codec.pad, codec.vocab_size) == (codec.pieces + 5, codec.pieces + 9)
    with pytest.raises(ValueError, match="half a surrogate pair"):
        codec.encode("\ud800")
    again = pickle.loads(pickle.dumps(codec))  # to workers
    assert again.encode("goldfish") == codec.encode("goldfish") and again.fingerprint() == codec.fingerprint()
    assert TokenizerJson(path, codec.pieces, codec.bos, codec.bos, 5).fingerprint() != codec.fingerprint()


def test_files_that_would_lose_text_are_refused(trained, tmp_path):
    path, _, codec = trained
    told = json.loads(path.read_text())
    lacking = {k: v for k, v in told["model"]["vocab"].items() if k != "Z"}
    cases = (
        (told | {"model": told["model"] | {"vocab": lacking}}, "lacks 1 of 256 bytes"),
        (told | {"model": {"type": "Bible", "vocab": told["model"]["vocab"]}}, "is not read by the tokenizers library"),
    )
    for number, (content, words) in enumerate(cases):
        (tmp_path / f"{number}.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=words) as error:
            TokenizerJson(tmp_path / f"{number}.json", codec.pieces, codec.bos, codec.eos).encode("a")
        assert "\n" not in str(error.value)


def test_nothing_is_opened_before_the_first_text(tmp_path):
    codec = TokenizerJson(tmp_path / "none.json", pieces=151_669, bos=151_643, eos=151_645, reserved=267)
    assert (codec.spec.vocab, codec.pad, codec.image_end) == (151_940, 151_936, 151_939)
    with pytest.raises(FileNotFoundError, match=r"none\.json"):
        codec.encode("a")
    for wrong in ({"bos": 9}, {"eos": -1}, {"reserved": -1}):
        with pytest.raises(ValueError, match="is not possible"):
            TokenizerJson("x", **{"pieces": 9, "bos": 0, "eos": 1} | wrong)


@pytest.mark.parametrize(
    "change, pieces, words",
    [
        ({}, 3, "has 2 tokens, the config says 3: set its pieces"),
        ({"added_tokens": [{"id": 2, "content": "c"}]}, 2, ""),  # behind the pieces: ours
        ({"added_tokens": [{"id": 1, "content": "c"}, {"id": 1, "content": "d"}]}, 2, "two words of one id"),
        ({"added_tokens": [{"id": 2, "content": "c"}, {"id": 3, "content": "c"}]}, 4, "adds a token twice .c."),
        ({"model": {"vocab": {}}}, 2, "is no tokenizer.json"),
        ({"model": None}, 2, "is no tokenizer.json"),
        ({"added_tokens": [3]}, 2, "is no tokenizer.json"),
    ],
)
def test_other_numbers_and_forms_are_refused(change, pieces, words):
    if not words:
        assert plain_tokenizer(SMALL | change, "it", pieces)["added_tokens"] == []
        return
    with pytest.raises(ValueError, match=words):
        plain_tokenizer(SMALL | change, "it", pieces)
