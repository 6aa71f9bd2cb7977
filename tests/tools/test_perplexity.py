"""From a run or a folder of weights to perplexity and bits per byte of a text."""

import json
import math
import shutil

import jax
import numpy as np
import pytest

from configs import digits
from src.build import build_system
from src.data.pipeline.reader import stack
from src.interfaces import row_of
from src.tools import perplexity
from src.tools.language.opened import open_run, open_weights
from src.train.state import init_state
from src.train.system import clean_view, losses
from src.train.trainer import make_trainer
from tests.golden.lm_eval.texts import documents
from tests.helpers.language import GOLDEN, TOKENIZER, golden
from tests.helpers.published import run as converted
from tests.helpers.weights import published, with_checkpoint


def run(capsys, *flags):
    code = perplexity.main(["perplexity", *flags])
    return code, capsys.readouterr()


def weights(*flags):
    return [f"--weights={GOLDEN}/llama", f"--tokenizer={TOKENIZER}", "--batch_size=16", *flags]


def test_tokens_and_bytes_are_counted_exactly(tmp_path, capsys):
    text = "\n".join(row["text"].replace("\n", " ") for row in documents()[:3]) + "\n\n"
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    flags = weights(f"--text={tmp_path}/text.txt", f"--json={tmp_path}/p.json")
    code, told = run(capsys, *flags, "--context=64")
    assert code == 0, told.err
    found = json.loads((tmp_path / "p.json").read_text())
    model, ids = golden(), golden().encode_plain(text)
    want = [sum(nats for nats, _ in model.log_likelihoods([([model.codec.bos, *ids[:i]], [ids[i]])])) for i in (0, 5)]
    assert model.whole([ids[:1]])[0] == (pytest.approx(want[0], abs=1e-5), 1)
    assert (found["tokens"], found["bytes"], found["texts"]) == (len(ids), len(text.encode()), 1)
    assert found["perplexity"] == pytest.approx(math.exp(found["nats"] / len(ids)))
    assert found["bits_per_byte"] == pytest.approx(found["nats"] / len(text.encode()) / math.log(2))
    assert found["nats"] == pytest.approx(-model.whole([ids], 64)[0][0], abs=1e-3)
    assert found["setting"]["context"] == 64 and found["model"]["max_length"] == 128
    code, told = run(capsys, *flags, "--lines")
    found, lines = json.loads((tmp_path / "p.json").read_text()), text.strip().split("\n")
    assert code == 0 and found["texts"] == 3 and found["bytes"] == sum(map(len, lines))
    assert found["nats"] == pytest.approx(
        -sum(n for n, _ in model.whole([model.encode_plain(x) for x in lines])), abs=1e-3
    )


@pytest.mark.faults
def test_a_run_is_scored_as_it_was_trained(tmp_path):
    config = digits.get_config("debug").unlock()
    config.fields.text.codec = {"name": "text:Bytes"}
    config.tasks = {"number_sentences": config.tasks.number_sentences}
    config.batch, config.eval.evaluators, config.eval.ema, config.sharding.min_size = 8, {}, False, 64
    config.mesh.update({"data": 2, "fsdp": 4})
    system = build_system(config)
    trainer = make_trainer(system)
    state = jax.jit(lambda: init_state(system.init, trainer.optimizer, 0))()
    other = jax.tree.map(lambda leaf: leaf * 2, state.params)
    with_checkpoint(tmp_path / "run", trainer, state.replace(ema=other))
    task = system.tasks["number_sentences"].task
    batch = task.build(stack([task.read("train", number) for number in range(8)]))
    (name,) = batch.tokens
    values, valid, target = (np.asarray(getattr(batch.tokens[name], part)) for part in ("value", "valid", "target"))
    pairs = []
    for row in range(8):
        first, end = int(target[row].argmax()), int(valid[row].sum())
        assert target[row, first:end].all()
        pairs.append((values[row, :first].tolist(), values[row, first:end].tolist()))
    view = clean_view(system.fields, system.tasks["number_sentences"].layout, batch)
    drawn = {"number_sentences": view}, {"number_sentences": {"text": {name: ()}}}
    nll = jax.jit(lambda params: losses(system, params, drawn)["number_sentences/text/nll"].total)(other)
    model = open_run(config, str(tmp_path / "run"), ema=True)
    assert model.network.program(8).specs, "parameters are split"
    assert -sum(nats for nats, _ in model.log_likelihoods(pairs)) == pytest.approx(float(nll), rel=1e-5)
    assert model.network.length == system.tasks["number_sentences"].layout.length
    assert model.about["ema"] is True and model.about["step"] == 0 and model.about["field"] == row_of(name)


def test_converted_weights_score_as_published_ones(tmp_path, capsys):
    shutil.copytree(GOLDEN / "llama", tmp_path / "there")
    shutil.copy(TOKENIZER, tmp_path / "there")
    assert converted(capsys, source=tmp_path / "there", out=tmp_path / "init", new_words=0)[0] == 0
    model = open_weights(str(tmp_path / "init"), batch_size=16)
    assert model.about["weights"] == golden().about["weights"] and model.network.length == 128
    assert model.network.field.codec.fingerprint == golden().network.field.codec.fingerprint


def test_published_weights_without_special_tokens_are_read(tmp_path):
    """A Llama whose rows are the pieces alone: what follows an end of text is padding, which has no row."""
    published(tmp_path / "llama", vocab_size=93)
    model = open_weights(str(tmp_path / "llama"), tokenizer=str(TOKENIZER), length=24)
    assert model.codec.pad == model.codec.unk and model.network.field.spec.vocab == 93
    assert all(np.isfinite(nats) for nats, _ in model.log_likelihoods([([1, 5], [6, 7]), ([1], [2])]))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ([], "give a run, --config"),
        (["--weights=x", "--config=configs/digits.py", "--workdir=x", "--text=t"], "give a run, --config"),
        (["--weights={f}/none"], "give --text"),
        (["--weights={f}/none", "--text={f}/none.txt"], "none.txt"),
        (["--weights={f}/none", "--text={f}/empty.txt"], "has no text"),
        (["--weights={f}/none", "--text={f}/latin.txt"], "is not UTF-8 (byte 1)"),
        (["--weights={f}/none", "--text={f}/a.txt"], "neither config.json nor weights.json"),
        (["--weights={g}/llama", "--text={f}/a.txt"], "there is no tokenizer.model in"),
        (["--weights={g}/llama", "--tokenizer={t}", "--text={f}/a.txt"], "characters that the tokenizer does not know"),
        (["--weights={g}/llama", "--tokenizer={t}", "--context=500", "--text={f}/b.txt"], "give 1 to 128"),
    ],
)
def test_what_cannot_be_measured_is_told_in_one_sentence(flags, told, tmp_path, capsys):
    for name, data in (("empty", b" \n"), ("latin", b"a\xe9"), ("a", b"A?!"), ("b", b"he said")):
        (tmp_path / f"{name}.txt").write_bytes(data)
    code, out = run(capsys, *[flag.format(f=tmp_path, g=GOLDEN, t=TOKENIZER) for flag in flags])
    assert code == 1 and out.err.count("\n") == 1 and told in out.err, out.err
