"""The evaluator of text in several modes: what is counted, and likelihoods of a small system."""

import math
import types

import jax
import numpy as np
import pytest

from configs import text_blocks
from src.build import build_system
from src.data.sources.arithmetic import Arithmetic
from src.evals.text_modes import TextModesEvaluator
from src.sampling.decoders.blocks import Blocks
from src.sampling.decoders.left_to_right import LeftToRight


class Codec:
    """Ids are places in a list of texts."""

    def __init__(self):
        self.texts = []

    def decode(self, ids):
        return self.texts[ids[0]]


class Fake:
    """A pipeline that gives a right answer in every mode but `wrong`, and a number of passes."""

    def __init__(self, source):
        self.codec, self.source, self.asked = Codec(), source, []
        self.fields = {"text": types.SimpleNamespace(codec=types.SimpleNamespace(host=self.codec))}

    def counted(self, task, given, seed, decoders):
        self.asked.append((task, seed, decoders["text"]))
        ids = []
        for number, example in enumerate(given):
            answer = self.source._answers[example["prompt"]][number % 2]
            good = decoders["text"].steps > 1 or number % 2
            self.codec.texts.append(answer if good else "nothing")
            ids.append([len(self.codec.texts) - 1, 0, 0])
        return {"text.sentence": ids}, np.full(len(given), decoders["text"].steps)


def test_answers_are_judged_and_passes_counted():
    source = Arithmetic()
    task = types.SimpleNamespace(source=source, fill=("text.sentence",))
    modes = {"four": Blocks(steps=4), "one": Blocks(steps=1)}
    pipeline = Fake(source)
    evaluator = TextModesEvaluator({"sums": task}, names=("sums",), modes=modes, answers=40, texts=0, timed=1)
    found = evaluator(pipeline, 3).scalars
    assert found["sums/four/valid"] == 1.0 and found["sums/one/valid"] == 0.5
    assert found["sums/four/tokens_per_call"] == 1.0 and found["sums/one/tokens_per_call"] == 4.0
    assert {"sums/four/valid_sum", "sums/four/valid_order", "sums/four/valid_count"} <= set(found)
    assert found["sums/one/tokens_per_second"] > 0 and len(pipeline.asked) == 4
    assert {seed for _, seed, _ in pipeline.asked} == {3}


def test_a_task_without_a_judge_is_refused():
    task = types.SimpleNamespace(source=object())
    with pytest.raises(ValueError, match="no task whose source judges answers"):
        TextModesEvaluator({"a": task}, names=("a",), modes={})


@pytest.mark.faults
def test_the_likelihoods_of_a_random_system_are_those_of_chance():
    """At the start all ids are about as likely, so that both perplexities are near the size of the vocabulary."""
    config = text_blocks.get_config("debug").unlock()
    config.eval.evaluators.text_modes.update({"answers": 0, "texts": 4, "draws": 8, "modes": {}})
    config.fields.text.head.init = "normal:0.001"
    system = build_system(config.lock())
    pipeline = system.pipeline.with_params(jax.jit(system.init)(jax.random.key(0)))
    found, vocab = system.evaluators["text_modes"](pipeline, 0).scalars, system.fields["text"].spec.vocab
    for task in ("arithmetic", "number_sentences"):
        for name in ("perplexity_next", "perplexity_bound"):
            assert found[f"{task}/{name}"] == pytest.approx(vocab, rel=0.02)
        assert found[f"{task}/perplexity_bound_draws"] == 4 * 8
        assert 0 <= found[f"{task}/perplexity_bound_error"] < 0.02 * vocab
    assert math.isfinite(found["arithmetic/perplexity_bound"])


def test_a_variant_of_the_config_chooses_the_decoder():
    """Of one checkpoint: what its run was trained with does not change."""
    blocks, one_by_one = (text_blocks.get_config(name) for name in ("", "next"))
    assert isinstance(build_system(blocks).pipeline.decoders["text"], Blocks)
    assert isinstance(build_system(one_by_one).pipeline.decoders["text"], LeftToRight)
    plain = lambda config: {k: v for k, v in config.to_dict().items() if k != "decode"}
    assert plain(blocks) == plain(one_by_one)
