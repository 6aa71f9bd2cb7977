"""The bench runs on a tiny system, its figures agree with each other, and operations are those counted by hand."""

import json
import types

import jax
import pytest

from configs import latentlm_digits
from src.build import build_system
from src.tools import bench as tool
from src.tools.benchmarks import clock, peer
from src.train.flops import step_flops
from src.train.trainer import make_trainer
from tests.helpers.runs import config_of


@pytest.fixture(scope="module")
def figures():
    config = config_of(**{"sample.batch_size": 4, "decode.text.max_new_tokens": 3})
    parts = ("step", "data", "sample", "decode")
    return json.loads(json.dumps(tool.bench(config, parts, steps=3, devices=jax.devices()[:1], peak_size=64)))


@pytest.mark.faults
def test_every_part_has_its_figures_and_says_where_they_are_from(figures):
    assert set(figures) == {"first_step", "peak", "step", "data", "sample", "decode"}
    for group in figures.values():
        assert set(group["where"]) == {"machine", "jax", "python", "date", "config", "version"}
        assert group["where"]["jax"] == jax.__version__
    marks = list(figures["first_step"]["seconds"].values())
    assert marks == sorted(marks) and marks[0] > 0
    assert figures["step"]["memory_bytes"]["process_peak"] > 2**26
    assert "tokens_per_second" in tool.table(figures)


@pytest.mark.faults
def test_figures_agree_with_each_other(figures):
    step, median = figures["step"], figures["step"]["seconds"]["median"]
    assert (step["tokens"], step["images"]) == (32 * 26 + 24 * 26 + 32 * 10, 32 + 24)
    assert step["seconds"]["count"] == 3
    assert step["tokens_per_second"] == pytest.approx(step["tokens"] / median)
    assert step["images_per_second"] == pytest.approx(step["images"] / median)
    assert step["peak_flops_per_second"] == figures["peak"]["float32"]["flops_per_second"]
    assert step["mfu"] == pytest.approx(step["model_flops"]["total"] / median / step["peak_flops_per_second"])
    peak = figures["peak"]["bfloat16"]
    assert peak["flops_per_second"] == pytest.approx(2 * 64**3 / peak["seconds"])
    data = figures["data"]
    assert data["rows_per_second"] == pytest.approx(88 / data["seconds_per_batch"])
    assert data["times_what_the_step_takes"] == pytest.approx(median / data["seconds_per_batch"])
    for drawn in (figures["sample"]["plain"], figures["sample"]["guided"]):
        assert drawn["images_per_second"] == pytest.approx(4 / drawn["seconds"]["median"])
    decode = figures["decode"]
    assert decode["tokens"] == 4 * 3
    assert decode["tokens_per_second"] == pytest.approx(12 / decode["seconds"]["median"])


@pytest.mark.faults
def test_a_step_does_not_take_over_the_parameters_that_are_compared():
    trainer = make_trainer(build_system(config_of(**{"mesh.data": 2})), jax.devices()[:2])
    params = peer.disturbed(trainer.init().params)
    state = peer.fresh(types.SimpleNamespace(trainer=trainer), params)
    taken = jax.jit(lambda s: jax.tree.map(lambda a: a + 1, s), donate_argnums=0)(state)
    assert jax.tree.leaves(state.params)[0].is_deleted() and jax.tree.all(jax.tree.map(lambda a, b: (a + 1 == b).all(),
        jax.device_get(params), jax.device_get(taken.params)))  # fmt: skip


def test_operations_are_those_counted_by_hand():
    """Width 32, 2 layers, 2 heads over 1, feed-forward 64; patches of 4 features."""
    system = build_system(config_of())
    flops = step_flops(system)
    lengths = [[(s.lead, s.length) for s in plan.layout.segments] for plan in system.tasks.values()]
    # prompt, image behind a time token, tail; head, image, caption; sentence
    assert lengths == [[(0, 7), (1, 16), (0, 2)], [(0, 2), (1, 16), (0, 7)], [(0, 10)]]
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64  # q and out, k and v, the feed-forward network
    assert flops["trunk"] == 6 * 2 * layer * 1776
    assert flops["image/embed"] == 6 * (4 * 32) * 16 * (32 + 24)
    assert flops["time"] == 6 * (256 * 32 + 32 * 32) * (32 + 24)
    assert flops["conditioning"] == 6 * (2 * 32 * 32) * (32 + 24)
    assert flops["image/head"] == 6 * 32 * (4 * 32 * 16 + 64 * 32)  # only what is denoised
    assert flops["text/head"] == 6 * 32 * system.fields["text"].spec.vocab * (24 * 7 + 32 * 10)
    past = lambda n: n * (n + 1) // 2
    ahead = past(15)  # patches also see the later patches of their image
    pairs = (32 + 24) * (past(26) + ahead) + 32 * past(10)
    assert flops["attention"] == 2 * 3 * 4 * 32 * pairs
    assert flops["total"] == sum(value for name, value in flops.items() if name != "total")


def test_operations_of_own_parts_are_those_of_the_plain_trunk_and_frozen_weights_cost_two_thirds():
    """Rank 3 on q and down, of which the latter acts on text alone."""
    config = config_of(**{"model.trunk.mot": ("mlp",)})
    plain = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64
    assert step_flops(build_system(config))["trunk"] == 6 * 2 * plain * 1776
    config.model.lora.update({"rank": 3, "targets": "attention/q|mlp/down"})
    text, image = 32 * 9 + 24 * 9 + 32 * 10, (32 + 24) * 17
    attention, mlp = (32 * 32 * 2 + 32 * 16 * 2) * 1776, 3 * 32 * 64 * text
    adapters = 3 * (32 + 32) * 1776 + 3 * (64 + 32) * text
    assert step_flops(build_system(config))["trunk"] == 2 * (
        4 * (attention + mlp) + 6 * (3 * 32 * 64 * image + adapters)
    )


def test_operations_of_a_field_that_is_diffused_token_by_token_in_its_head():
    """LatentLM: four draws for each of 16 patches, whose states are read once; both tasks embed them."""
    system = build_system(config_of(latentlm_digits))
    flops, head = step_flops(system), system.config.fields.image.head
    wide, width = head.mlp_width, system.config.model.trunk.width
    rows = system.tasks["caption_to_image"].rows
    drawn = (256 + wide) * wide + 4 * wide + wide * 2 * wide + wide * 4 + head.depth * wide * (3 + 2) * wide
    assert flops["image/head"] == 6 * rows * 16 * (width * wide + head.draws * drawn)
    assert "time" not in flops and "conditioning" not in flops


def test_spread():
    assert clock.spread([5.0, 1.0, 2.0, 3.0, 4.0]) == {"median": 3.0, "p10": 1.0, "p90": 5.0, "count": 5}


def test_refusals(capsys):
    assert tool.main(["bench"]) == 1
    assert "no config is given" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--only=speed is no part of the bench; there are step, data"):
        tool.bench(config_of(), ("speed",))
