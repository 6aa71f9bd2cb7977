"""A chat without an image has the published loss: every token behind the first <s> is predicted, and by what is said
before it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.codecs.text import Bytes
from src.data.sources.llava import Llava
from src.data.task import SourceTask
from src.data.templates.picture_chat import PictureChat
from src.interfaces import Batch, FieldSpec, View
from src.models.model import bind
from src.objectives.next_token import NextToken
from src.sequence.layout import FixedLayout
from src.sequence.segment import Segment
from tests.helpers import models
from tests.helpers.fields import field
from tests.helpers.rows import build

TALK = ("Why is the sky blue?", "Light scatters.", "Really?", "Yes.")
HEAD, LENGTH = 8, 64


class Eye:
    """A network that reads images; none is shown here."""

    where, shape, takes = "frozen", models.FEATURES, (4, 4, 3)
    spec = FieldSpec((models.FEATURES[0],), features=models.FEATURES[1])

    def preprocess(self, pixels):
        raise AssertionError("no image is there")


@pytest.fixture(scope="module")
def row(tmp_path_factory):
    """The row of a chat of text alone, with the published options."""
    path = tmp_path_factory.mktemp("llava")
    said = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(TALK)]
    (path / "l.json").write_text(json.dumps([{"conversations": said}]))
    template = PictureChat(HEAD, LENGTH, marks=False, train_on_source=True, question=128)
    fields = {"text": field("text", Bytes()), "vision": field("vision", Eye())}
    task = SourceTask("t", Llava(path / "l.json", path), template, fields)
    return task.layout, build(task, "train", [0])


@pytest.mark.faults
def test_text_alone_has_as_many_targets_as_the_published_loss(row, monkeypatch):
    monkeypatch.setattr(models, "VOCAB", Bytes.vocab_size)
    layout, batch = row
    words = Bytes()
    pair = lambda question, answer: [words.bos, *words.encode(question + answer), words.eos]
    ids = np.array([[*pair(*TALK[:2]), *pair(*TALK[2:])]], np.int32)
    architecture, params = models.make()
    net = bind(architecture, params)

    def loss(names, batch, layout):
        objective, view = NextToken(names), View(batch, layout, {}, {})
        draws = objective.draw(jax.random.key(0), architecture.table, view)
        return objective.loss(net, net.hidden({"t": view})["t"], draws)["nll"]

    features = np.zeros((1, *models.FEATURES), np.float32)  # what the encoder makes of no image
    batch = batch.replace(tokens=batch.tokens | {"vision": batch.tokens["vision"].replace(value=features)})
    batch = jax.tree.map(jnp.asarray, batch)
    found = loss(("text.head", "text.rest"), batch, layout)
    one = FixedLayout((Segment("text.all", ids.shape[1]),))
    published = loss(("text.all",), Batch({"text.all": models.tokens(ids)}), one)  # one row, shifted by one
    assert found.count == published.count == ids.size - 1 == 49
    np.testing.assert_allclose(found.total, published.total, rtol=1e-6)
