"""EZ-VC: rows to be filled in, the loss on the span alone, conditions that are dropped, the sway of times."""

import dataclasses
import functools
import itertools
from unittest.mock import create_autospec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import ezvc_voice
from src.build import build_system
from src.codecs.mel import Mel
from src.codecs.text import Bytes
from src.common.tree import count_parameters
from src.corruption.gaussian import Gaussian
from src.corruption.schedules import Linear
from src.corruption.timesteps import Uniform, sway_time
from src.data.example import BadRow, Example
from src.data.sources.voice import Voice
from src.data.task import SourceTask
from src.data.templates._base import Request
from src.data.templates.infilling import Infilling
from src.interfaces import Field, FieldSpec, Hidden, Net, View
from src.objectives.diffusion import Diffusion
from src.objectives.losses.squared_error import SquaredError
from src.sampling.raw_values import decoded
from src.sampling.steps.gaussian import Euler
from tests.helpers.fields import field, patches

MEL = Mel(frames=64, rate=8000, window=256, hop=128, bands=32, floor=1e-3)
PROCESS = Gaussian(field=FieldSpec((64, 1), features=32), schedule=Linear(), parameterization="velocity")


def fields():
    codec = field("frames", MEL, patches(1, shift=-5.0, scale=0.6)).codec
    return {name: Field(name, codec.spec, codec) for name in ("frames", "prompt")} | {"units": field("units", Bytes())}


@functools.cache
def task(place="spread"):
    return SourceTask("speak", Voice(mel=MEL), Infilling(place=place), fields())


def rows(place, *uniforms):
    """The batch of training row 0 with these uniform numbers each."""
    found = [task(place).read("train", 0, np.array(each)) for each in uniforms]
    return task(place).build({key: np.stack([row[key] for row in found]) for key in found[0]})


def test_known_frames_are_those_beside_the_span():
    """Uniform numbers: share and start of the span, both dropped, prompt dropped."""
    example = task().source[0]
    mel, count = MEL.encode(example["audio"]), len(example["labels"])
    draws = (0, 0.5, 0.9, 0.9), (0, 0.5, 0.9, 0.1), (0, 0.5, 0.1, 0.9), (1, 0.5, 0.9, 0.9)
    batch = rows("spread", *draws)
    frames, prompt, units = (batch.tokens[name] for name in ("frames", "prompt", "units"))
    size = round(0.7 * count)
    first = (count - size + 1) // 2
    span = (np.arange(64) >= first) & (np.arange(64) < first + size)
    np.testing.assert_array_equal(frames.target[:3], np.tile(span, (3, 1)))
    assert frames.target[3].sum() == frames.valid[3].sum() == count and not prompt.target.any()
    np.testing.assert_array_equal(frames.value[:, :count], np.tile(mel, (4, 1, 1, 1)))
    np.testing.assert_array_equal(prompt.value[0, :count][~span[:count]], mel[~span[:count]])
    known = (prompt.value != -5.0).any(axis=(2, 3))  # the shift: what becomes zeros
    np.testing.assert_array_equal(known[0], ~span & (np.arange(64) < count))
    assert not known[1:].any()
    said = "".join(map(chr, units.value[0, :count]))
    assert "".join(letter for letter, _ in itertools.groupby(said)) == example["text"]
    pad = Bytes.pad
    assert (units.value[2] == pad).all() and (units.value[1] != pad).sum() == count
    published = rows("first", draws[0]).tokens["units"].value[0]
    letters = len(example["text"])
    assert "".join(map(chr, published[:letters])) == example["text"] and (published[letters:] == pad).all()


def test_a_question_is_a_text_and_another_voice():
    question = task().questions(1)[0]
    layout, batch = task().prompt([question])
    _, null = task().prompt([question], null=True)
    mel = MEL.encode(question["voice"])
    np.testing.assert_array_equal(batch.tokens["prompt"].value[0, :16], mel)
    assert batch.tokens["frames"].target.all() and "audio" not in question and question["frames"] == 48
    assert len(layout.segments) == 1 and (null.tokens["units"].value == batch.tokens["units"].value).sum() == 0
    assert (null.tokens["prompt"].value == batch.tokens["prompt"].value)[0, 16:].all()
    np.testing.assert_array_equal(null.tokens["frames"].target, batch.tokens["frames"].target)
    own = task().template.question(Example({"audio": question["voice"], "text": "ae"}, "one"))
    assert len(own["voice"]) == 2 * 128 and own["frames"] == 14


def test_padding_is_cut_from_what_is_made():
    _, batch = task().prompt([{"text": "ae", "frames": 10}, {"text": "ae"}])
    values = np.zeros((2, 64, 32), np.float32)
    made = decoded(fields()["frames"], values, batch.tokens["frames"], lambda name, value: value)
    assert [each.shape for each in made] == [(10, 1, 32), (64, 1, 32)] and (made[0] == -5.0).all()


def test_the_loss_is_on_the_span_alone():
    """The gradient of the loss with respect to the head's outputs is 0 off the span, and not on it."""
    objective = Diffusion("frames", SquaredError(), Uniform())
    batch = jax.tree.map(jnp.asarray, rows("spread", (0, 0.5, 0.9, 0.9)))
    x0 = (batch.tokens["frames"].value[:, :, 0] + 5.0) * 0.6
    c = PROCESS.corrupt(x0, jnp.zeros_like(x0), jnp.full((1, 1), 0.5))
    view = View(batch, task().layout)
    hidden = Hidden(view, x0, {})

    def total(output):
        net = create_autospec(Net, instance=True)
        net.field.return_value.process, net.field.return_value.return_value = PROCESS, output
        return objective.loss(net, hidden, {"frames": c})["mse"].total

    found = np.abs(jax.jit(jax.grad(total))(jnp.zeros_like(x0))).sum(axis=-1)
    np.testing.assert_array_equal(found > 0, batch.tokens["frames"].target)


def test_sway():
    """0 is the uniform grid, -1 the closed form sin(pi t / 2); F5-TTS's formula in its own time 1 - t."""
    uniform, half, whole = (np.asarray(Euler(sway=sway).times(PROCESS, 8)) for sway in (0.0, -0.5, -1.0))
    grid = np.linspace(PROCESS.schedule.t_max, 0, 9)
    np.testing.assert_allclose(uniform, grid, atol=1e-6)
    np.testing.assert_allclose(whole, np.sin(np.pi / 2 * grid), atol=1e-6)
    theirs = 1 - grid
    np.testing.assert_allclose(1 - half, theirs - 0.5 * (np.cos(np.pi / 2 * theirs) - 1 + theirs), atol=1e-6)
    assert (np.diff(np.asarray(sway_time(jnp.asarray(grid), 1.75))) < 0).all()
    with pytest.raises(ValueError, match=r"sway=-1\.1"):
        Euler(sway=-1.1)


@pytest.mark.parametrize(
    "example, told",
    [
        ({"text": "ae"}, "no audio"),
        ({"text": "ae", "audio": np.ones((512, 2))}, "one channel"),
        ({"text": "ae", "audio": np.full(512, np.nan)}, "not finite"),
        ({"text": "ae", "audio": np.zeros(512)}, "samples are 0"),
        ({"text": "aeaea", "audio": np.ones(512)}, "longer than its audio"),
        ({"text": "", "audio": np.ones(512)}, "text is empty"),
    ],
)
def test_bad_rows(example, told):
    template = task().template
    with pytest.raises(BadRow, match=told):
        template.row(Example(example, "row 3"), Request())


def test_bad_prompts_and_options():
    with pytest.raises(ValueError, match="80, and there is room for 1 to 64"):
        task().prompt([{"text": "ae", "frames": "80"}])
    with pytest.raises(ValueError, match="give a text, and a voice"):
        task().prompt([{"text": "ae", "audio": np.ones(512)}])
    other = Voice(mel=dataclasses.replace(MEL, bands=30))
    with pytest.raises(ValueError, match="give both the same"):
        SourceTask("speak", other, Infilling(), fields())
    for options in ({"span": (0.9, 0.7)}, {"place": "last"}):
        with pytest.raises(ValueError, match="|".join(options)):
            Infilling(**options)


def test_published_sizes_build():
    system = build_system(ezvc_voice.get_config("published"))
    assert count_parameters(jax.eval_shape(system.init, jax.random.key(0))) == 328_234_832
    assert system.fields["frames"].spec == FieldSpec((3000, 1), features=80)
