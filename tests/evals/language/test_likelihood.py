"""Likelihoods and continuations against those of lm-eval's `hf` on the golden Llama, and laws between them."""

import dataclasses

import jax
import numpy as np
import pytest

from src.evals.language import likelihood
from src.evals.language.continuation import continue_rows
from src.evals.language.likelihood import log_likelihoods, windows
from src.evals.language.text_model import TextModel
from tests.golden.lm_eval.texts import choices, documents, prompts
from tests.helpers.language import expected, golden, pairs

NATS = 1e-4  # of each token


def differ(found, want, tokens):
    """The largest difference of sums of so many tokens each, in nats a token."""
    return (np.abs(np.asarray(found) - want) / tokens).max()


def test_questions_have_the_likelihoods_of_the_peer():
    model, want, asked = golden(), expected(), pairs()
    texts = [f"Question: {row['question']}\nAnswer:" for row in choices() for _ in row["choices"]]
    assert [model.encode(text) for text in texts] == [context for context, _ in asked]
    assert max(len(context) for context, _ in asked) > model.network.length, "some contexts lose their beginning"
    some, done = slice(0, None, 17), []
    found = model.log_likelihoods(asked[some], done.append)
    assert differ([nats for nats, _ in found], want["log_likelihood"][some], want["pair_continuation"][some]) < NATS
    assert [greedy for _, greedy in found] == want["greedy"][some].tolist()
    assert done[-1] == len(found) and done == sorted(done)


def test_documents_have_the_likelihoods_of_the_peer():
    model, some = golden(), slice(0, None, 13)
    texts = [model.encode(row["text"]) for row in documents()[some]]
    assert max(map(len, texts)) > 2 * model.network.length, "some documents need several windows"
    found = model.whole(texts)
    assert [count for _, count in found] == list(map(len, texts))
    assert differ([nats for nats, _ in found], expected()["rolling"][some], list(map(len, texts))) < NATS


def test_prompts_go_on_as_those_of_the_peer():
    model, some = golden(), slice(0, None, 13)
    want = expected()["texts"][some].tolist()
    asked = [f"{row['prompt']}\n" for row in prompts()[some]]
    assert max(len(model.encode(text)) for text in asked) > model.network.length - 40
    assert model.go_on(asked, 40, until=["ni", "\n\n"]) == want
    assert len(set(map(len, want))) > 10, "stops end the texts at many places"


def test_windows_predict_each_token_once_in_full_rows():
    for length, context, count in ((4, 1, 10), (4, 3, 10), (5, 5, 9), (8, 1, 8), (3, 2, 1), (3, 1, 0)):
        ids = list(range(count))
        found = list(windows(ids, -1, length, context))
        assert [i for _, new in found for i in new] == ids
        for number, (before, new) in enumerate(found):
            read = [*before, *new][:-1]
            assert len(read) <= length and read == ([-1, *ids])[new[-1] + 1 - len(read) : new[-1] + 1]
            assert number == 0 or (len(read) == length and len(before) >= context)
    assert list(windows(range(10), -1, 4)) == [([-1], [0, 1, 2, 3]), ([3], [4, 5, 6, 7]), ([5, 6, 7], [8, 9])]
    with pytest.raises(ValueError, match="a context of 5 tokens"):
        list(windows([1], 0, 4, 5))


def test_what_is_made_greedily_is_the_most_likely_and_rows_are_shared(monkeypatch):
    network = dataclasses.replace(golden().network, batch_size=3)
    rows = []
    monkeypatch.setattr(likelihood, "LOGITS", 4 * 97 * 2)  # two tokens of a row at a time
    call = likelihood._call
    monkeypatch.setattr(likelihood, "_call", lambda net, batch, size: rows.extend(batch) or call(net, batch, size))
    start = [1, 30, 60]
    made = continue_rows(network, [start, [*start, 5]], 7)
    other = [*made[0][:-1], (made[0][-1] + 1) % 90]
    asked = [(start, made[0]), (start, other), ([*start, *made[0][:3]], made[0][3:]), ([*start, 5], made[1])]
    found = log_likelihoods(network, asked)
    assert [greedy for _, greedy in found] == [True, False, True, True]
    assert len(rows) == 2, "requests that read the same ids share a row"
    parts = [log_likelihoods(network, [(start + made[0][:i], made[0][i : i + 1])])[0][0] for i in range(7)]
    assert found[0][0] == pytest.approx(sum(parts), abs=1e-5)
    assert found[2][0] == pytest.approx(sum(parts[3:]), abs=1e-5)


def test_one_device_computes_what_eight_do():
    network, asked = golden().network, pairs()[:40:4]
    assert network.mesh is not None and network.mesh.size == jax.device_count() == 8
    alone = dataclasses.replace(network, params=jax.device_get(network.params))
    for (ours, _), (theirs, _) in zip(log_likelihoods(alone, asked), log_likelihoods(network, asked), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


def test_what_cannot_be_scored_is_refused():
    model = golden()
    network = model.network
    for pair, told in (
        (([], [1]), "pair 0 has an empty context"),
        (([1], []), "pair 0 has an empty context or continuation"),
        (([1], [2] * 129), "a continuation of 129 tokens, and 128 are read at once"),
    ):
        with pytest.raises(ValueError, match=told):
            log_likelihoods(network, [pair])
    with pytest.raises(ValueError, match="at least one token"):
        continue_rows(network, [[]], 4)
    with pytest.raises(ValueError, match="128 new tokens leave no room"):
        model.go_on(["he"], 128)
    with pytest.raises(ValueError, match="at least 1 of both"):
        dataclasses.replace(network, batch_size=0)


def test_chats_are_encoded_as_in_training():
    model = golden()
    turns = [
        {"role": "system", "content": "he said"},
        {"role": "user", "content": "how is it called?"},
        {"role": "assistant", "content": "apple"},
        {"role": "user", "content": "is it near?"},
    ]
    text = model.chat(turns)
    assert text == "<s>he said\n\nhow is it called? apple</s><s>is it near? "
    codec, encode = model.codec, model.encode_plain
    ids = [codec.bos, *encode("he said\n\nhow is it called?"), *encode("apple"), codec.eos]
    ids += [codec.bos, *encode("is it near?")]
    assert model.encode(text.rstrip()) == ids
    assert model.chat([*turns, {"role": "assistant", "content": "it"}], answer=False).endswith("near? it")
    headed = TextModel(model.network, headers=True)
    assert headed.chat(turns[1:2]) == "<s>### Human: how is it called? ### Assistant: "
    with pytest.raises(ValueError, match="message 1 of a chat is of 'user'"):
        model.chat([turns[1], turns[1]])
