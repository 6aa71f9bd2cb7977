"""Small random networks over words, images that are denoised, and images that are only read; and a row of them."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from src.codecs.chain import Chain
from src.codecs.patch import Patch
from src.codecs.pixels import Pixels
from src.corruption.gaussian import Gaussian
from src.corruption.schedules import Linear
from src.interfaces import Batch, Field, FieldSpec, Tokens, View
from src.models.build import build_architecture
from src.models.model import bind
from src.sequence.layout import FixedLayout
from src.sequence.segment import Segment

ROWS, VOCAB = 2, 11
FEATURES = (3, 5)  # tokens of an image that is read, and numbers of each
GROUPS = {
    "text": {"embed": {"name": "tokens"}, "head": {"name": "categorical"}},
    "image": {"embed": {"name": "patches"}, "head": {"name": "adaln"}},
    "vision": {"embed": {"name": "features"}},
}


def chain(*links):
    """A codec of these links."""
    return Chain(tuple(links))


def given(spec, shape=()):
    """A link whose values are tokens already."""
    return SimpleNamespace(where="host", shape=shape, spec=spec, fingerprint=None)


def table(process=None):
    """The rows text, image (4 patches of 4 numbers) and vision."""
    pixels = Pixels(4, 4, 1)
    patches = chain(pixels, Patch(2, before=pixels))
    process = process or Gaussian(field=patches.spec, schedule=Linear(), parameterization="velocity")
    words, read = FieldSpec(vocab=VOCAB), FieldSpec((FEATURES[0],), features=FEATURES[1])
    return {
        "text": Field("text", words, chain(given(words))),
        "image": Field("image", patches.spec, patches, process, time_token=True),
        "vision": Field("vision", read, chain(given(read, FEATURES)), time_token=True),
    }


def make(conditioning="TimeToken", scale=0.3, lora=None, dtype="float32", rows=table, **trunk):
    """(architecture, parameters); every tensor is random, so that nothing hides behind a zero, and none is computed."""
    model = {
        "dtype": dtype,
        "trunk": {"width": 16, "depth": 2, "heads": 4, "kv_heads": 2, "mlp_width": 24, "qk_norm": True} | trunk,
        "mot_fields": ("image", "vision"),
        "conditioning": {"name": f"conditioning:{conditioning}"},
        "lora": lora or {},
        "time": {},
    }
    architecture, init = build_architecture(model, GROUPS, rows())
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(init, jax.random.key(0))
    return architecture, jax.tree.map(lambda s: jnp.asarray(scale * rng.normal(size=s.shape), s.dtype), shapes)


def tokens(value, valid=None, target=None):
    """Tokens, all of them there and targets unless it is said otherwise."""
    value = jnp.asarray(value)
    shape = value.shape[:2]
    valid, target = (jnp.ones(shape, bool) if a is None else jnp.asarray(a, bool) for a in (valid, target))
    return Tokens(value, valid, target)


def row(mode="bidirectional", conditioning="TimeToken", rows=ROWS):
    """The view of [text.p PAD] [image] [text.c PAD], rows of different lengths, with the image at two times."""
    lead = int(conditioning == "TimeToken")
    image = Segment("image", 4, mode, role="noisy", lead=lead)
    layout = FixedLayout((Segment("text.p", 3), image, Segment("text.c", 3)))
    rng = np.random.default_rng(0)
    valid = {"text.p": [[1, 1, 1], [1, 1, 0]], "text.c": [[1, 1, 0], [1, 1, 1]]}
    batch = {n: tokens(rng.integers(0, VOCAB, (ROWS, 3)).astype(np.int32), valid[n]) for n in ("text.p", "text.c")}
    clean, noisy = rng.normal(size=(2, ROWS, 4, 4)).astype(np.float32)
    batch["image"] = tokens(clean)
    times = {"image": jnp.asarray([[500.0], [3.0]])}
    return View(Batch(batch), layout, {"image": jnp.asarray(noisy)}, times)


@functools.partial(jax.jit, static_argnums=0)
def hidden(architecture, params, view):
    """Hidden states of the rows of one task."""
    return bind(architecture, params).hidden({"t": view})["t"]


def value(view, name, new):
    """The view with other clean values of a name."""
    tokens = view.batch.tokens | {name: view.batch.tokens[name].replace(value=new)}
    return view.replace(batch=view.batch.replace(tokens=tokens))
