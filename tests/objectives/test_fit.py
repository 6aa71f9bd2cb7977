"""Objectives that would train something else than they say are refused before anything is compiled."""

import dataclasses

import pytest

from src.corruption.categorical import Categorical
from src.corruption.gaussian import Gaussian
from src.corruption.schedules import Linear
from src.corruption.timesteps import Uniform
from src.interfaces import Field, FieldSpec
from src.objectives._fit import check_hints, check_objectives
from src.objectives.diffusion import Diffusion
from src.objectives.losses.cross_entropy import CrossEntropy
from src.objectives.losses.poisson import Poisson
from src.objectives.losses.posterior_kl import PosteriorKL
from src.objectives.losses.squared_error import SquaredError
from src.objectives.next_token import NextToken
from src.sequence.layout import FixedLayout
from src.sequence.segment import Segment

VECTORS, IDS = FieldSpec((2, 2), features=4), FieldSpec((4,), vocab=7)
FIELDS = {
    "text": Field("text", FieldSpec(vocab=9), None),
    "image": Field("image", VECTORS, None, Gaussian(field=VECTORS, schedule=Linear(), parameterization="velocity")),
    "codes": Field("codes", IDS, None, Categorical(field=IDS)),
}


def diffusion(name="image", loss=None, **options):
    return Diffusion(name, loss or SquaredError(), Uniform(), **options)


def check(objectives, **segments):
    """The objectives of a task with a causal text and an image and codes with noise, or with these segments."""
    options = {"text": {}, "image": {"blocks": 0, "role": "noisy"}, "codes": {"blocks": 0, "role": "noisy"}} | segments
    layout = FixedLayout(tuple(Segment(name, 4, **given) for name, given in options.items()))
    check_objectives("tasks.t.objectives", layout, objectives, FIELDS)


@pytest.mark.parametrize(
    "objectives, segments, told",
    [
        ({"a": NextToken("words")}, {}, r"tasks\.t\.objectives\.a is about \['words'\]"),
        ({"a": NextToken("text")}, {"text": {"blocks": "bidirectional"}}, r"\.a predicts .*'text'.*blocks=causal"),
        ({"a": NextToken("text")}, {"text": {"blocks": (1, 3)}}, r"\.a predicts .*'text'.*blocks=causal"),
        ({"a": diffusion()}, {"image": {"blocks": 0}}, r"\.a adds noise to 'image'.*role=noisy or role=copies"),
        ({"a": diffusion("text")}, {}, r"\.a adds noise to 'text', but fields\.text has no process"),
        ({"a": diffusion(), "b": diffusion()}, {}, r"\.b adds noise to 'image', as a does"),
        ({"a": diffusion(hint=0.5)}, {}, r"\.a has hint=0\.5.*fields\.image\.hint"),
        ({"a": diffusion(loss=CrossEntropy())}, {}, r"CrossEntropy does not fit .*fields\.image, Gaussian.*no logits"),
        ({"a": diffusion(loss=Poisson())}, {}, "Poisson does not fit"),
        ({"a": diffusion(loss=PosteriorKL())}, {}, "PosteriorKL does not fit"),
        ({"a": diffusion("codes")}, {}, r"SquaredError does not fit .*fields\.codes, Categorical"),
        (
            {"a": diffusion(), "b": NextToken("image")},
            {"image": {"blocks": 1, "role": "noisy"}},
            r"\.b predicts 'image' from tokens that a adds noise to.*role=copies",
        ),
    ],
)
def test_refused(objectives, segments, told):
    with pytest.raises(ValueError, match=told):
        check(objectives, **segments)


def test_accepted():
    check({"a": NextToken("text"), "b": diffusion(), "c": diffusion("codes", CrossEntropy())})
    copies = {"blocks": 1, "noisy_blocks": 2, "role": "copies"}
    check({"a": NextToken("codes"), "b": diffusion("codes", PosteriorKL())}, codes=copies)
    check({"a": NextToken("image")}, image={"blocks": 1, "role": "noisy"})


def test_a_hint_that_nothing_trains_is_refused():
    fields = FIELDS | {"image": dataclasses.replace(FIELDS["image"], hint=True)}
    with pytest.raises(ValueError, match=r"fields\.image\.hint is set, but no objective"):
        check_hints([diffusion(), NextToken("text")], fields)
    check_hints([diffusion(hint=0.5)], fields)
