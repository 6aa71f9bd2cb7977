"""The model of lm-eval and its command, on the golden Llama; what is computed is in tests/evals/language."""

import importlib.util
import json

import jax
import numpy as np
import pytest

from src.build import build_system
from src.evals.language.elbo import Elbo
from src.tools import lm_eval as tool
from src.tools.language.opened import open_run
from src.train.state import init_state
from src.train.trainer import make_trainer
from tests.golden.lm_eval.texts import TASKS, write_tasks
from tests.helpers.language import GOLDEN, TOKENIZER, expected, golden
from tests.helpers.weights import with_checkpoint

harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed (requirements-eval.txt)"
)


# Block diffusion of bytes with a step of random weights, and a task of its questions.
BLOCKS = """
from configs import text_blocks

def get_config():
    config = text_blocks.get_config("{variant}").unlock()
    config.fields.text.codec = {{"name": "text:Bytes"}}
    config.tasks = {{"number_sentences": config.tasks.number_sentences}}
    config.tasks.number_sentences.template.length = 48
    config.batch, config.eval.evaluators, config.eval.ema = 8, {{}}, False
    return config.lock()
"""
QUESTIONS = [
    {"question": "2 + 2 is", "choices": ["4", "five", "ten"], "answer": 0},
    {"question": "so many words that a row of bytes is too short for them", "choices": ["no", "y"], "answer": 1},
    {"question": "-", "choices": ["a longer answer", "-"], "answer": 1},
]


def run(capsys, *flags):
    code = tool.main(["lm_eval", *flags])
    return code, capsys.readouterr()


def command(folder, *flags):
    return [f"--weights={GOLDEN}/llama", f"--tokenizer={TOKENIZER}", f"--include_path={folder}", *flags]


@pytest.fixture
def offline(monkeypatch, tmp_path):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    from datasets import config

    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def test_what_is_missing_is_told_before_anything_else(capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    code, told = run(capsys)
    assert code == 1 and "lm-eval is missing: pip install -r requirements-eval.txt" in told.err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    code, told = run(capsys, "--config=configs/digits.py")
    assert code == 1 and "give a run, --config=… and its --workdir=…, or --weights" in told.err


@harness
@pytest.mark.faults
def test_tasks_and_data_that_are_not_there_are_named(capsys, offline, tmp_path):
    code, told = run(capsys, *command(write_tasks(tmp_path), "--tasks=local_choises"))
    assert code == 1 and "has no task 'local_choises', did you mean local_choices?" in told.err
    code, told = run(capsys, *command(tmp_path))
    assert code == 1 and told.err.count("error:") == 1, told.err
    assert "the data of piqa are not here" in told.err and "--download --tasks=piqa,hellaswag,winogrande" in told.err


@harness
@pytest.mark.faults
def test_the_command_gives_a_table_and_a_report(capsys, offline, tmp_path):
    flags = command(write_tasks(tmp_path), f"--json={tmp_path}/s.json", "--limit=8", f"--tasks={','.join(TASKS)}")
    code, told = run(capsys, *flags, "--batch_size=32")
    assert code == 0, told.err
    report = json.loads((tmp_path / "s.json").read_text())
    assert "local_choices" in told.out and "acc_norm" in told.out and "bits_per_byte" in told.out
    assert report["setting"]["limit"] == 8 and report["n-samples"]["local_choices"]["effective"] == 8
    assert report["model"]["weights"] == golden().about["weights"] and report["lm_eval"] == "0.4.13"


@harness
@pytest.mark.faults
def test_all_questions_are_answered_as_by_the_peer(offline, tmp_path):
    """200 of each kind, through the harness: likelihoods, texts and scores are those of its own `hf`."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    from src.tools.language.harness import HarnessModel

    found = lm_eval.simple_evaluate(
        HarnessModel(model=golden()), tasks=list(TASKS), bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(write_tasks(tmp_path))),
    )  # fmt: skip
    samples = {name: sorted(rows, key=lambda row: row["doc_id"]) for name, rows in found["samples"].items()}
    want = expected()
    scored = [answer for row in samples["local_choices"] for answer in row["filtered_resps"]]
    off = np.abs(np.array([float(nats) for nats, _ in scored]) - want["log_likelihood"]) / want["pair_continuation"]
    assert len(scored) == 800 and off.max() < 1e-4
    assert [greedy in (True, "True") for _, greedy in scored] == want["greedy"].tolist()
    rolling = np.array([float(row["filtered_resps"][0]) for row in samples["local_rolling"]])
    np.testing.assert_allclose(rolling, want["rolling"], rtol=1e-5)
    assert [row["filtered_resps"][0] for row in samples["local_generate"]] == want["texts"].tolist()
    scores = json.loads(str(want["results"]))
    for task in TASKS:
        for metric, value in scores[task].items():
            if isinstance(value, float):
                assert found["results"][task][metric] == pytest.approx(value, rel=1e-5), metric


@harness
@pytest.mark.faults
@pytest.mark.parametrize(("variant", "block"), [("debug", 4), ("whole,debug", 0)])
def test_bounds_through_the_harness_are_those_of_the_library(variant, block, capsys, offline, tmp_path):
    """Log-likelihoods of a multiple-choice task under block and masked diffusion, by the model's name and by the
    command, are minus the bounds of the same pairs from the same draws."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    import src.tools.language.harness  # noqa: F401 - makes the name known

    (tmp_path / "config.py").write_text(BLOCKS.format(variant=variant))
    (tmp_path / "local.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{tmp_path}/local.jsonl"}}}
    task = {
        "task": "local",
        "test_split": "test",
        **source,
        "output_type": "multiple_choice",
        "doc_to_target": "answer",
    }
    task |= {"doc_to_text": "{{question}}", "doc_to_choice": "choices", "metric_list": [{"metric": "acc"}]}
    (tmp_path / "local.yaml").write_text(json.dumps(task))
    spec = importlib.util.spec_from_file_location("config", tmp_path / "config.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    trainer = make_trainer(build_system(module.get_config()))
    state = jax.jit(lambda: init_state(trainer.system.init, trainer.optimizer, 0))()
    with_checkpoint(tmp_path / "run", trainer, state)

    arguments = {"config": f"{tmp_path}/config.py", "workdir": f"{tmp_path}/run", "likelihood": "elbo", "draws": 16}
    found = lm_eval.simple_evaluate(
        "monoformer", arguments, tasks=["local"], bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(tmp_path)),
    )  # fmt: skip
    samples = sorted(found["samples"]["local"], key=lambda row: row["doc_id"])
    scored = [[float(nats) for nats, _ in row["filtered_resps"]] for row in samples]
    text = open_run(module.get_config(), f"{tmp_path}/run")
    ids = text.codec.encode
    pairs = [([text.codec.bos, *ids(q["question"])], ids(f" {each}")) for q in QUESTIONS for each in q["choices"]]
    bounds = Elbo({"role": "copies", "blocks": 1, "noisy_blocks": block}, draws=16)(text.network, pairs)
    assert [nats for row in scored for nats in row] == [-bound.nats for bound in bounds], "the same draws"
    exact = text.log_likelihoods(pairs)
    assert all(abs(b.nats + nats) > 1e-3 for b, (nats, _) in zip(bounds, exact, strict=True)), (
        "no next-token prediction"
    )
    right = [int(np.argmax(row)) == q["answer"] for row, q in zip(scored, QUESTIONS, strict=True)]
    assert found["results"]["local"]["acc,none"] == pytest.approx(np.mean(right))

    flags = [f"--{name}={value}" for name, value in arguments.items()]
    code, told = run(capsys, *flags, "--tasks=local", f"--include_path={tmp_path}", f"--json={tmp_path}/s.json")
    assert code == 0, told.err
    report = json.loads((tmp_path / "s.json").read_text())
    assert report["results"]["local"]["acc,none"] == found["results"]["local"]["acc,none"]
    assert report["model"]["likelihood"] == "elbo" and report["model"]["bounds"] == len(pairs)
    errors = [bound.error for bound in bounds]
    assert report["model"]["standard_error"] == pytest.approx(np.sqrt(np.mean(np.square(errors))))
    assert report["model"]["largest_standard_error"] == max(errors) > 0


@harness
def test_the_harness_knows_the_model_by_name_and_what_it_is_asked():
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import get_model

    from src.tools.language.harness import HarnessModel

    assert get_model("monoformer") is HarnessModel
    model = HarnessModel(model=golden())
    ask = lambda options: model.generate_until([Instance("generate_until", {}, ("he said", options), 0)])
    with pytest.raises(ValueError, match="cannot be made with num_beams"):
        ask({"num_beams": 4})
    with pytest.raises(ValueError, match="cannot be made with typical_p"):
        ask({"typical_p": 0.2})
    drawn = [ask({"do_sample": True, "temperature": 1.0, "max_gen_toks": 8}) for _ in range(2)]
    assert drawn[0] == drawn[1] != ask({"max_gen_toks": 8})
    assert model.chat_template(True) == "<s>… …</s>" and model.chat_template(False) is None
    with pytest.raises(ValueError, match="there is no chat template 'other'"):
        model.chat_template("other")
    for options, told in (({}, "model_args need a run"), ({"batch_size": "auto"}, "batch_size=auto is not known")):
        with pytest.raises(ValueError, match=told):
            HarnessModel(**options)
