"""Small random networks over any fields, and a comparison that NaN fails."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from src.corruption.gaussian import Gaussian
from src.corruption.schedules import Linear
from src.interfaces import Batch, Field, FieldSpec, Tokens, View
from src.models.build import build_architecture
from src.models.model import Network, bind
from src.sampling.steps.gaussian import Euler
from src.sequence.layout import FixedLayout

WORDS = FieldSpec(vocab=13)
MODEL = {
    "dtype": "float32",
    "trunk": {"width": 16, "depth": 2, "heads": 2, "init": 0.3},
    "conditioning": {"name": "conditioning:TimeToken"},
    "time": {"init": 0.3},
}
TEXT = {"embed": {"name": "tokens", "init": 1.0}, "head": {"name": "categorical", "init": 0.5}}
VECTORS = {"embed": {"name": "patches"}, "head": {"name": "adaln", "init": 0.3, "adaln_init": 0.3}}


def text_field(name="text", codec=None, **options):
    """A row of ids that are made by the head."""
    return Field(name, WORDS, codec, noise=lambda key, shape: (), **options)


def vector_field(name="image", grid=(2, 2), features=4, step=None, **options):
    """A row of vectors with Gaussian noise."""
    spec = FieldSpec(grid, features=features)
    process = Gaussian(field=spec, schedule=Linear(), parameterization="velocity")
    return Field(name, spec, None, process, step or Euler(), **options)


def network(table, groups, seed=0, **model):
    """(architecture, parameters), every tensor random, so that nothing hides behind a zero."""
    architecture, init = build_architecture(MODEL | model, groups, table)
    leaves, structure = jax.tree.flatten(init(jax.random.key(seed)))
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [a + 0.2 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    return architecture, jax.tree.unflatten(structure, noisy)


@functools.partial(jax.jit, static_argnums=0)
def _hidden(architecture, params, views):
    return bind(architecture, params).hidden(views)


class Net(Network):
    """A network whose hidden states are one program, unless they are part of one."""

    def hidden(self, views):
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(views)):
            return super().hidden(views)
        return _hidden(self.architecture, nnx.to_pure_dict(nnx.state(self.model)), views)


def net(table, groups, **model):
    """The network itself."""
    architecture, params = network(table, groups, **model)
    return Net(architecture, bind(architecture, params).model)


def tokens(value, valid=None, target=False, **more):
    """Tokens of numpy values; `target` of all, or by token."""
    value = np.asarray(value)
    valid = np.ones(value.shape[:2], bool) if valid is None else np.asarray(valid, bool)
    return Tokens(value, valid, np.broadcast_to(np.asarray(target, bool), value.shape[:2]).copy(), **more)


def ids(rows, length, pad=0):
    """Rows of ids of different lengths, padded: (value, valid)."""
    value = np.full((len(rows), length), pad, np.int32)
    for i, row in enumerate(rows):
        value[i, : len(row)] = row
    return value, np.arange(length) < np.array([len(row) for row in rows])[:, None]


def batch(cond=None, **by_name):
    """A batch of tokens; a dot in a name is written as two underscores."""
    return Batch({name.replace("__", "."): each for name, each in by_name.items()}, cond or {})


def view_of(segments, rows, *more):
    """Rows as the network reads them; `more`: noisy values, times and hints by name."""
    return View(jax.tree.map(jnp.asarray, rows), FixedLayout(segments), *more)


def close(a, b, tolerance=1e-5):
    """Raises AssertionError unless both are finite and differ by no more."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.shape == b.shape, f"shapes {a.shape} and {b.shape}"
    assert np.isfinite(a).all() and np.isfinite(b).all(), "a value is not finite"
    worst = float(np.abs(a.astype(np.float64) - b.astype(np.float64)).max())
    assert worst <= tolerance, f"they differ by {worst:.2e}"


def broadcast(t, rows):
    """A scalar time for each row, [B, 1]."""
    return jnp.broadcast_to(jnp.asarray(t, jnp.float32), (rows, 1))
