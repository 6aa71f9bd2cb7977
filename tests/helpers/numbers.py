"""A system that is a few numbers: what a step does with them can be followed by hand."""

from unittest.mock import create_autospec

import jax.numpy as jnp

from src import interfaces
from src.interfaces import Hidden, LossTerm
from src.models.model import Architecture
from src.sequence.layout import FixedLayout
from src.train import system as systems
from src.train.system import System, TaskPlan


class Net(interfaces.Net):
    """Nothing but its parameters."""

    def __init__(self, params):
        self.params = params

    def hidden(self, views):
        return {name: Hidden(view, jnp.zeros((1, 0, 1)), {}) for name, view in views.items()}


class Numbers:
    """An objective about no tokens: `product(params, view, drawn)` is its loss, and `noise(key)` what it draws."""

    names = ()

    def __init__(self, product, noise):
        self.product, self.noise = product, noise

    def draw(self, key, fields, view):
        return self.noise(key)

    def prepare(self, net, view, draws):
        return view, (view, draws)

    def loss(self, net, hidden, aux):
        return {"product": LossTerm(self.product(net.params, *aux), jnp.ones(()))}


def plan_of(objectives, rows=1, layout=None):
    """A task of which nothing is asked but its layout."""
    task = create_autospec(interfaces.Task, instance=True)
    task.layout, task.fill = layout or FixedLayout(()), ()
    return TaskPlan(task, task.layout, rows, objectives)


def bare(tasks=None, config=None, fields=None):
    """A system without a network."""
    architecture = create_autospec(Architecture, instance=True)
    return System(config, fields or {}, architecture, lambda key: {}, tasks or {})


def system_of(monkeypatch, config, product, noise):
    """The system of one task `t` with the objective `o`; its network has the parameters as they are."""
    monkeypatch.setattr(systems, "bind", lambda architecture, params, placement: Net(params))
    return bare({"t": plan_of({"o": (Numbers(product, noise), 1.0)})}, config)
