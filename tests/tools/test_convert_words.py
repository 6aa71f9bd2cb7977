"""Words that a Llama has beyond its tokenizer's pieces, and the tokenizer's files of what goes in and out."""

import json

import pytest

from src.codecs.text import SPECIALS, Bytes, SentencePiece, train_sentencepiece
from src.codecs.tokenizer_json import plain_tokenizer
from src.models.pretrained.initial_weights import Initial
from src.models.pretrained.llama_weights import TABLE
from src.tools.conversion import convert as conversion
from src.tools.conversion.tokenizer import json_pieces, words_by_id
from tests.cases.llamas import llama
from tests.helpers.published import as_run, run

FOREIGN = ("<pad>", "[INST]", "[/INST]", "<tool>")
RESERVED = "fields.text.codec.host.reserved"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    train_sentencepiece(["a red cat sits on a mat", "what is it? a dog and a fox"], 300, path, byte_fallback=True)
    return path.read_bytes(), SentencePiece(path).pieces


def with_words(folder, model, rows, files):
    """A Llama with so many rows beyond its pieces; `files` by name."""
    llama(folder, vocab=model[1] + rows)
    (folder / "tokenizer.model").write_bytes(model[0])
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))


def named(form, words, first):
    """The files that name words from an id on, in one of the forms that transformers writes."""
    ids = dict(enumerate(words, first))
    listed = [{"id": 0, "content": "<unk>"}, *({"id": i, "content": w} for i, w in ids.items())]
    return {
        "added": {"added_tokens.json": {w: i for i, w in ids.items()}},
        "config": {"tokenizer_config.json": {"pad_token": "</s>", "added_tokens_decoder": {
            str(i): {"content": w} for i, w in ({2: "</s>"} | ids).items()}}},
        "whole": {"tokenizer.json": {"added_tokens": listed, "model": {"vocab": {}}}},
        "map": {"special_tokens_map.json": {"pad_token": "</s>", "additional_special_tokens": list(words)}},
    }[form]  # fmt: skip


def converted(capsys, folder, **flags):
    code, said, error = run(capsys, source=folder, out=f"{folder}-out", **flags)
    assert code == 0, error
    return Initial(f"{folder}-out"), said


@pytest.mark.parametrize("form", ["added", "config", "whole", "map"])
@pytest.mark.parametrize("count", [1, 4])
def test_words_of_others_keep_their_rows_before_the_special_tokens(form, count, model, tmp_path, capsys):
    pieces = model[1]
    with_words(tmp_path / "l", model, count, named(form, FOREIGN[:count], pieces))
    found, said = converted(capsys, tmp_path / "l")
    assert found.shapes[TABLE].shape[0] == pieces + count + 4 and found.meta["about"][RESERVED] == count
    assert f"set fields.text.codec.reserved={count} (and pieces={pieces} of text:Llama)" in said
    words = words_by_id(tmp_path / "l-out")
    assert [words[pieces + count + i] for i in range(4)] == list(SPECIALS)
    kept = FOREIGN[:count] if form != "map" else [f"<|reserved_{pieces + i}|>" for i in range(count)]
    assert [words[pieces + i] for i in range(count)] == list(kept)
    assert json.loads((tmp_path / "l-out" / "tokenizer_config.json").read_text())["pad_token"] == "<PAD>"


@pytest.mark.parametrize("form", ["added", "config", "whole", "map"])
def test_the_special_tokens_are_known_by_their_names(form, model, tmp_path, capsys):
    """Then nothing grows; also behind words of others."""
    for number, words in enumerate((SPECIALS, ("<pad>", *SPECIALS))[: 1 if form == "map" else 2]):
        with_words(tmp_path / str(number), model, len(words), named(form, words, model[1]))
        found, _ = converted(capsys, tmp_path / str(number))
        assert found.shapes[TABLE].shape[0] == model[1] + len(words)
        assert found.meta["about"].get(RESERVED, 0) == number


def test_a_llama_comes_back_with_its_words(model, tmp_path, capsys):
    """In, out and in again: the same weights, and their padding is `<PAD>`."""
    with_words(tmp_path / "l", model, 0, {"tokenizer_config.json": {"pad_token": "</s>"}} | {
        "special_tokens_map.json": {"pad_token": {"content": "</s>"}, "bos_token": "<s>"}})  # fmt: skip
    first, _ = converted(capsys, tmp_path / "l")
    assert run(capsys, source=tmp_path / "l-out", out=tmp_path / "back")[0] == 0
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        assert json.loads((tmp_path / "back" / name).read_text())["pad_token"] == "<PAD>"
    again, _ = converted(capsys, tmp_path / "back")
    assert again.hash == first.hash and again.shapes[TABLE].shape[0] == model[1] + 4


def test_rows_that_nothing_names_are_asked_about(model, tmp_path, capsys):
    with_words(tmp_path / "l", model, 4, {})
    code, _, error = run(capsys, source=tmp_path / "l", out=tmp_path / "out")
    assert code == 1 and "give --new_words=0 if they are <PAD>" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    for words, rows in ((0, 4), (4, 8)):
        assert run(capsys, source=tmp_path / "l", out=tmp_path / str(words), new_words=words)[0] == 0
        found = Initial(tmp_path / str(words))
        assert found.shapes[TABLE].shape[0] == model[1] + rows
        assert found.meta["about"].get(RESERVED, 0) == rows - 4
        assert words_by_id(tmp_path / str(words))[model[1] + rows - 4] == "<PAD>"


def test_a_padded_vocabulary_keeps_its_rows(model, tmp_path, capsys):
    """Its files name every row, since the tokenizers library numbers added words without gaps."""
    with_words(tmp_path / "l", model, 20, {"tokenizer.json": {"added_tokens": []}})
    found, _ = converted(capsys, tmp_path / "l")
    assert found.shapes[TABLE].shape[0] == model[1] + 24 and found.meta["about"][RESERVED] == 20
    tokens = json.loads((tmp_path / "l-out" / "tokenizer.json").read_text())["added_tokens"]
    assert [token["id"] for token in tokens] == list(range(model[1], model[1] + 24))


def test_names_that_are_taken_go_to_the_special_tokens(model, tmp_path, capsys):
    """As of a Llama that was tuned on ChatML."""
    words = ("<|im_end|>", "<|im_start|>")
    with_words(tmp_path / "l", model, 2, named("added", words, model[1]) | named("config", words, model[1]))
    _, said = converted(capsys, tmp_path / "l")
    assert f"the words <|im_end|> ({model[1]}), <|im_start|> ({model[1] + 1}) of the tokenizer keep their rows" in said
    found = words_by_id(tmp_path / "l-out")
    assert [found[model[1] + 2 + i] for i in range(4)] == list(SPECIALS) and found[model[1]].startswith("<|reserved_")
    assert len(set(found.values())) == len(found)


def test_other_ends_of_texts_are_told_and_stay_beside_that_of_a_run(model, tmp_path, capsys, monkeypatch):
    """As of a Llama that was tuned on ChatML: its answers end with <|im_end|>, and those of a run with </s>."""
    pieces, words = model[1], ("<|im_start|>", "<|im_end|>")
    files = named("config", words, pieces) | {"generation_config.json": {"eos_token_id": [2, pieces + 1]}}
    files["tokenizer_config.json"] |= {"eos_token": "<|im_end|>", "bos_token": {"content": "<s>"}}
    files["special_tokens_map.json"] = {"eos_token": {"content": "<|im_end|>"}}
    with_words(tmp_path / "l", model, 2, files)
    _, said = converted(capsys, tmp_path / "l")
    end = f"{pieces + 1} (<|im_end|>), and a run here ends it with </s> (2)"
    assert f"{tmp_path / 'l'}: generation_config.json ends a text with {end}" in said.splitlines()
    told = {name: json.loads((tmp_path / "l-out" / name).read_text()) for name in files}
    # the name that it had is that of the end of an image now
    assert told["tokenizer_config.json"]["eos_token"] == words_by_id(tmp_path / "l-out")[pieces + 1]
    assert told["special_tokens_map.json"]["eos_token"] == {"content": f"<|reserved_{pieces + 1}|>"}
    assert told["generation_config.json"] == files["generation_config.json"]
    workdir = as_run(tmp_path / "l-out", {}, monkeypatch)
    trained = conversion.find_trained

    def in_bytes(source, options):
        found = trained(source, options)
        found.config["fields"]["text"]["codec"] = {"name": "text:Bytes"}
        return found

    monkeypatch.setattr(conversion, "find_trained", in_bytes)
    code, said, error = run(capsys, source=workdir, out=tmp_path / "back", tokenizer=tmp_path / "l-out")
    assert code == 0, error
    told = {n: json.loads((tmp_path / "back" / n).read_text()) for n in ("config.json", "generation_config.json")}
    assert [told["config.json"][name] for name in ("bos_token_id", "eos_token_id")] == [Bytes.bos, Bytes.eos]
    assert told["generation_config.json"]["eos_token_id"] == [Bytes.eos, 2, pieces + 1]
    assert f"generation_config.json ends a text with {Bytes.eos}, as the run did, and with 2, {pieces + 1}" in said


def test_a_tokenizer_without_a_sentencepiece_model_is_told(tmp_path, capsys):
    """Llama 3's: the ids of its words are known from tokenizer.json."""
    llama(tmp_path / "l", vocab=96)
    (tmp_path / "l" / "tokenizer.json").write_text(json.dumps(named("whole", ("<|a|>", "<|b|>"), 94)["tokenizer.json"]))
    found, said = converted(capsys, tmp_path / "l")
    assert "tokenizer files: tokenizer.json; no tokenizer.model, which the text codecs read" in said
    assert found.shapes[TABLE].shape[0] == 100 and RESERVED not in found.meta["about"]
    assert words_by_id(tmp_path / "l-out")[96] == "<PAD>"


def test_a_tokenizer_json_has_pieces_too(tmp_path, capsys):
    """As Qwen's: its own words behind the vocabulary, one with our name, and rows without a word."""
    llama(tmp_path / "l", vocab=96)
    words = [{"id": 86 + i, "content": word} for i, word in enumerate(("<|end|>", "<|im_start|>", "<think>"))]
    told = {"model": {"vocab": {str(i): i for i in range(86)}}, "added_tokens": words}
    (tmp_path / "l" / "tokenizer.json").write_text(json.dumps(told))
    found, said = converted(capsys, tmp_path / "l")
    assert "no tokenizer.model: the codec tokenizer_json reads such texts" in said
    assert "set fields.text.codec.reserved=7 (and pieces=89 of tokenizer_json)" in said
    assert found.shapes[TABLE].shape[0] == 100 and found.meta["about"][RESERVED] == 7
    named = words_by_id(tmp_path / "l-out")
    assert [named[i] for i in (86, 87, 88, 89, 96, 98)] == [
        "<|end|>", "<|reserved_87|>", "<think>", "<|reserved_89|>", "<PAD>", "<|im_start|>"
    ]  # fmt: skip
    assert json_pieces(tmp_path / "l-out") == 89
    told["added_tokens"] = json.loads((tmp_path / "l-out/tokenizer.json").read_text())["added_tokens"]
    assert [token["id"] for token in plain_tokenizer(told, "it", 89)["added_tokens"]] == [86, 87, 88]


def test_an_export_of_a_run_pads_with_its_own_token(model, tmp_path, capsys, monkeypatch):
    """Though the tokenizer that it gets pads with `</s>` and names none of the special tokens."""
    with_words(tmp_path / "l", model, 0, {"tokenizer_config.json": {"pad_token": "</s>"}})
    converted(capsys, tmp_path / "l")
    workdir = as_run(tmp_path / "l-out", {}, monkeypatch)
    code, _, error = run(capsys, source=workdir, out=tmp_path / "back", tokenizer=tmp_path / "l")
    assert code == 0, error
    told = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    assert told["pad_token"] == "<PAD>"
    assert told["added_tokens_decoder"][str(model[1])]["content"] == "<PAD>"


@pytest.mark.parametrize(
    "rows, files, words",
    [
        (-3, {}, "has {pieces} pieces, and config.json has vocab_size={vocab}: give the tokenizer that"),
        (5, {"added_tokens.json": {w: 300 - i for i, w in enumerate(SPECIALS)}}, "to add rows of their own"),
        (1, {"added_tokens.json": {"a": 299}, "tokenizer_config.json": {"added_tokens_decoder": {
            "299": {"content": "b"}}}}, "names other words than the files beside it"),
        (1, {"added_tokens.json": {"a": "x"}}, "is no file of a tokenizer"),
        (1, {"tokenizer.json": {"added_tokens": [3]}}, "is no file of a tokenizer"),
        (1, {"tokenizer_config.json": [3]}, "is no JSON object"),
    ],
)  # fmt: skip
def test_tokenizers_that_do_not_fit_are_refused(rows, files, words, model, tmp_path, capsys):
    with_words(tmp_path / "l", model, rows, files)
    code, _, error = run(capsys, source=tmp_path / "l", out=tmp_path / "out")
    words = words.format(pieces=model[1], vocab=model[1] + rows)
    assert code == 1 and words in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()
