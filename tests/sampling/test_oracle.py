"""Every step sampler of every process, with the exact posterior for its network: the law of the samples tends to that
of the data, as steps^-1 for ancestral sampling."""

import numpy as np
import pytest

from src.corruption import keep
from src.corruption.by_id import ById
from src.corruption.categorical import Categorical
from src.corruption.counts import Counts
from src.corruption.distance import Distance
from src.corruption.gaussian import Gaussian
from src.corruption.keep import ByPlace
from src.corruption.mask_and_uniform import GIDD, VQDiffusion
from src.corruption.schedules import CosineBetas, Linear
from src.interfaces import FieldSpec
from src.sampling.steps import gaussian
from src.sampling.steps.ancestral import Ancestral
from src.sampling.steps.categorical import Confidence
from tests.helpers.oracle import CategoricalOracle, CountsOracle, GaussianOracle, floor, total_variation

IDS = FieldSpec((3,), vocab=3)
KERNELS = {
    "absorbing": Categorical(field=IDS),
    "several mask ids": Categorical(field=IDS, masks=4),
    "cosine": Categorical(field=IDS, schedule=keep.CosineDecay()),
    "uniform": Categorical(field=IDS, mask=0.0),
    "marginal": Categorical(field=IDS, mask=0.0, marginal=(0.5, 0.3, 0.2)),
    "mask and uniform": Categorical(field=IDS, mask=0.8),
    "absorbing mask and uniform": Categorical(field=IDS, mask=0.8, absorbing=True),
    "rehash": Categorical(field=IDS, masks=4, rehash=True),
    "gidd": GIDD(field=IDS, share=0.2),
    "vqdiffusion": VQDiffusion(field=IDS, steps=48),
    "distance": Distance(field=IDS, width=0.8),
    "by id": ById(field=IDS, importance=(0.9, 0.4, 0.0)),
    "by place": Categorical(field=IDS, schedule=ByPlace(importance=(2, 1, 0), strength=0.2)),
}
# Of GIDD the share of replaced tokens rises as sqrt(t), so that equal steps end with a large one.
SAMPLERS, SLOWER = {"gidd": Ancestral(timeline="power", exponent=2.0)}, {"distance": 0.24, "gidd": 0.3}
POINTS = FieldSpec((1,), features=2)
GAUSSIANS = {
    "flow": Gaussian(field=POINTS, schedule=Linear(), parameterization="velocity"),
    "ddpm": Gaussian(field=POINTS, schedule=CosineBetas(), parameterization="eps"),
}


LONG = (
    "by id",
    "by place",
    "cosine",
    "distance",
    "marginal",
    "rehash",
    "several mask ids",
    "vqdiffusion",
)  # of the group `faults`


@pytest.mark.parametrize("kernel", [pytest.param(k, marks=pytest.mark.faults) if k in LONG else k for k in KERNELS])
def test_categorical(kernel):
    oracle = CategoricalOracle(KERNELS[kernel])
    sampler = SAMPLERS.get(kernel, Ancestral())
    one, few, many = (total_variation(oracle, sampler, steps) for steps in (1, 4, 48))
    assert one > 0.3  # each token for itself
    assert 0.08 < few < SLOWER.get(kernel, 0.2)
    assert many < floor(oracle) + 0.015 < few / 2


@pytest.mark.parametrize("kernel", ["absorbing", "several mask ids", "mask and uniform"])
def test_confidence(kernel):
    """The annealed noise makes it a sampler of about the law; one token after the other is enough."""
    oracle = CategoricalOracle(KERNELS[kernel])
    one, three, many = (total_variation(oracle, Confidence(gumbel=4.0), steps) for steps in (1, 3, 8))
    assert one > 0.3 and three < 0.12 and many < 0.12


@pytest.mark.parametrize("rounding", ["stochastic", pytest.param("poisson", marks=pytest.mark.faults)])
def test_counts(rounding):
    oracle = CountsOracle(Counts(field=FieldSpec((1,), vocab=6, features=2), rounding=rounding))
    few, more, many = (total_variation(oracle, Ancestral(), steps) for steps in (4, 16, 64))
    assert few > 1.5 * more > 3 * many
    assert many < 0.1


@pytest.mark.parametrize("process", GAUSSIANS)
@pytest.mark.parametrize(
    "sampler",
    [
        Ancestral(),
        gaussian.DDPM(clip_x0=1.5),
        gaussian.DDIM(),
        gaussian.DDIM(eta=0.5),
        gaussian.Euler(),
        gaussian.Heun(),
        gaussian.EulerMaruyama(),
        gaussian.DPMSolverPP2M(),
    ],
    ids=lambda sampler: f"{type(sampler).__name__}{getattr(sampler, 'eta', '')}",
)
def test_gaussian(process, sampler):
    oracle = GaussianOracle(GAUSSIANS[process])
    few, many = (total_variation(oracle, sampler, steps) for steps in (4, 64))
    assert few > 0.02 or isinstance(sampler, gaussian.Heun | gaussian.DPMSolverPP2M)
    assert many < floor(oracle) + 0.012 and many < few


class Decided(CategoricalOracle):
    """The first token decides the others but for a tenth; alone it is even."""

    def probabilities(self):
        states = self.states()
        same = np.where(states[:, 1:] == states[:, :1], 0.9, 0.05).prod(axis=1)
        return same / same.sum()


def test_what_decides_the_rest_should_be_made_first():
    """The point of M2DM: with few steps, a schedule that keeps the important token longest errs less than one for all,
    or one that keeps it least. A strength of 0 is the schedule for all."""
    errors = {}
    for name, importance, strength in [("first", (1, 0, 0), 0.3), ("none", (1, 0, 0), 0.0), ("last", (0, 1, 1), 0.3)]:
        for options in ({}, {"mask": 0.8, "absorbing": True}):
            schedule = ByPlace(importance=importance, strength=strength)
            oracle = Decided(Categorical(field=IDS, schedule=schedule, **options))
            errors[name, bool(options)] = [total_variation(oracle, Ancestral(), steps) for steps in (2, 4)]
    for mixed in (False, True):
        (first, more), *others = (errors[name, mixed] for name in ("first", "none", "last"))
        assert all(first < two - 0.02 and more < four for two, four in others), errors
