"""The dry run's advice, from steps that are made up: each fault alone, and a healthy run without any."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import imagenet256
from src.build import build_system
from src.doctor import batch_checks, dry_run, memory
from src.interfaces import Batch, LossTerm, Tokens
from src.train.step import StepMetrics
from src.train.trainer import make_trainer
from tests.helpers.runs import config_of


def rows_of(images):
    """The batch of a task that makes these images."""
    there = np.ones((32, 16), bool)
    return {"caption_to_image": Batch({"image": Tokens(images.astype(np.float32), there, there)})}


IMAGES = np.linspace(-1, 1, 64 * 32).reshape(32, 8, 8, 1)
TERM = "caption_to_image/diffusion/mse"


@pytest.fixture(scope="module")
def trainer():
    return make_trainer(build_system(config_of(**{"optim.warmup": 4})), jax.devices()[:1])


class Clock:
    """Time goes by when it is told to."""

    now = 0.0

    def monotonic(self):
        return self.now

    def wait(self, seconds):
        self.now += seconds


def step_of(clock, loss=lambda k: 2.0 - k / 10, ratio=0.01):
    """A step that takes 0.1 s and measures what it is told; updates are `ratio` of the weights at the highest rate."""

    def update(state, batch):
        clock.wait(0.1)
        rate = (state + 1) / 4  # of the highest: half of it in the last step
        squares = {"trunk/layers/mlp/up/kernel": jnp.ones(2), "fields/image/head/linear/kernel": jnp.ones(())}
        updates = {k: (ratio * rate) ** 2 * v for k, v in squares.items()}
        terms = {TERM: loss(state), "total": loss(state), "grad_norm": 1e3, "buckets/a": 1e3}
        terms = {k: LossTerm(jnp.asarray(v), jnp.ones(()), "/a" not in k) for k, v in terms.items()}
        return state + 1, StepMetrics(terms, {"grad": squares, "update": updates, "param": squares}, {})

    return update


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(dry_run, "time", clock)
    return clock


def advice(trainer, clock, images=IMAGES, wait=0.01, scalars=None, **fault):
    batches = (clock.wait(wait) or rows_of(images) for _ in itertools.count())
    measurements = [lambda step, *a: {"conflict/norm/a": 1.0, "conflict/norm/b": 0.5, "conflict/cosine/a/b": -0.1}]
    measurements += [lambda *a: scalars or {}]
    with jax.set_mesh(trainer.mesh):
        seen = dry_run.run_steps(trainer, step_of(clock, **fault), 0, batches, 2, measurements, (batch_checks.values,))
    return seen, [str(f) for f in dry_run.advise(trainer, seen)]


def test_a_healthy_dry_run_brings_no_advice(trainer, clock):
    seen, said = advice(trainer, clock)
    assert said == []
    assert seen.losses == ({"loss": 2.0, TERM: 2.0}, {"loss": pytest.approx(1.9), TERM: pytest.approx(1.9)})
    assert seen.ends()["loss"] == pytest.approx((2.0, 1.9))
    assert seen.ratios == pytest.approx({"block_00": 0.01, "block_01": 0.01, "image/head": 0.01})
    assert seen.scalars["conflict/cosine/a/b"] == -0.1
    assert (seen.step, seen.data) == pytest.approx((0.1, 0.01))


@pytest.mark.parametrize(
    "fault, match",
    [
        (
            {"ratio": 0.2},
            r"^warning: at the highest learning rate, optim.lr=0.004, a step changes block_0\d by 20% of its",
        ),
        ({"loss": lambda k: 2.0 + k}, r"^warning: the loss rose from 2 to 3: lower optim.lr"),
        ({"loss": lambda k: 2.0 if k == 0 else np.inf}, f"^error: {TERM}, loss became NaN or infinite within 2 steps"),
        (
            {"wait": 0.3},
            r"^warning: training would wait for data: fetching takes 75% of the time .* raise data.workers",
        ),
        (
            {"scalars": {"conflict/norm/b": 0.03}},
            r"^warning: objective b gives 2.9% of the gradient on the trunk: raise",
        ),
    ],
)
def test_each_fault_brings_its_advice(trainer, clock, fault, match):
    (said,) = advice(trainer, clock, **fault)[1]
    assert re.search(match, said), said


def test_balance_is_not_judged_in_a_warm_up_that_has_hardly_begun(trainer, clock):
    """A head of zeros lets no gradient through yet: after 8 of 10,000 steps, 0.0% were measured on the digits."""
    slow = dataclasses.replace(trainer, schedule=lambda step: 0.004 * (step + 1) / 10_000)
    weak = {"scalars": {"conflict/norm/b": 0.0}}
    assert advice(slow, clock, ratio=1e-5, **weak)[1] == []
    assert len(advice(trainer, clock, **weak)[1]) == 1


def test_a_bad_batch_on_the_way_ends_it(trainer, clock):
    seen, (said,) = advice(trainer, clock, images=IMAGES * np.nan)
    assert seen.losses == () and seen.scalars == {} and "image of task caption_to_image has NaN" in said


def test_what_does_not_fit_is_refused_before_it_is_allocated(trainer, monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 8 * memory.GIB)
    refusal = r"^1,121,673,248 parameters .* 20.9 GiB, but this machine has 8.0 GiB: .*src.tools.aot"
    with pytest.raises(ValueError, match=refusal):
        memory.check_state(build_system(config_of(imagenet256, "paper")))
    lowered = jax.jit(lambda x: x @ x).lower(jax.ShapeDtypeStruct((1024, 1024), np.float32)).compile()
    assert memory.check_step(trainer, lowered) >= 8 * 2**20
    monkeypatch.setattr(memory, "free_memory", lambda: 7 * 2**20)
    with pytest.raises(ValueError, match=r"a step takes 0.0 GiB, .* lower batch, raise accumulate"):
        memory.check_step(trainer, lowered)


def test_the_room_of_this_machine_is_known():
    assert 2**26 < memory.free_memory() < 2**50
