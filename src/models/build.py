"""From the `model` and `fields` groups of a config, and the table of fields, to a Model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from src.common.lookup import build, check_arguments, check_kinds, lookup, telling
from src.common.rng import stream
from src.interfaces import Field, FieldSpec
from src.models import lora
from src.models.conditioning import Conditioning, TimestepEmbedder
from src.models.model import Architecture, FieldParts, Model
from src.models.transformer import Transformer

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def build_architecture(model: Mapping[str, Any], fields: Mapping[str, Any], table: Mapping[str, Field]) -> Any:
    """The model without its parameters, and the function key -> parameters, a nested dict. Its table also says what
    the losses of the heads draw (`Field.noise`).

    model, fields   groups of a config, plain dicts; `table` the rows that were built of `fields`

    Raises ValueError, naming the key, for unknown names and sizes that do not fit.
    """

    def make(key: jax.Array) -> Any:
        return nnx.split(build_model(model, fields, table, key))

    graph, shapes = nnx.eval_shape(make, jax.random.key(0))
    heads = nnx.merge(graph, shapes).fields
    table = {n: dataclasses.replace(f, noise=heads[n].head and heads[n].head.noise) for n, f in table.items()}
    own = tuple(model.get("mot_fields", ()))
    return Architecture(graph, table, own), lambda key: nnx.to_pure_dict(make(key)[1])


def build_model(
    model: Mapping[str, Any], fields: Mapping[str, Any], table: Mapping[str, Field], key: jax.Array
) -> Model:
    """Puts the parts of the fields and the trunk together. Call it under `jax.jit` or `nnx.eval_shape`.

    Every part draws from a key of its own name, so that what it starts from does not depend on the other parts.
    """
    if model["dtype"] not in DTYPES:
        raise ValueError(f"model.dtype={model['dtype']!r} is unknown; use one of {', '.join(DTYPES)}")
    dtype, width = DTYPES[model["dtype"]], model["trunk"]["width"]
    shared = {"width": width, "dtype": dtype}
    parts = {name: _parts(fields[name], field, stream(key, name), shared) for name, field in table.items()}
    timed = any(field.process is not None and field.timed for field in table.values())
    kind = lookup("models", model["conditioning"]["name"]) if timed else Conditioning
    trunk = _part(Transformer, "trunk", model["trunk"], key, layer=kind.Layer, dtype=dtype)
    conditioning = _part(kind, "conditioning", model["conditioning"] if timed else {}, key, **shared)
    time = _part(TimestepEmbedder, "time", model["time"], key, **shared) if timed else None
    lora.adapt(trunk, **model.get("lora", {}), rngs=nnx.Rngs(stream(key, "lora")))
    return Model(trunk, conditioning, parts, time)


def _part(cls: type, group: str, options: Mapping[str, Any], key: jax.Array, **given: Any) -> Any:
    """One part of the group `model.<group>`."""
    options = {k: v for k, v in dict(options).items() if k != "name"}
    arguments, where = options | given | {"rngs": nnx.Rngs(stream(key, group))}, f"model.{group} ({cls.__name__})"
    check_arguments(cls, arguments, where)
    check_kinds(cls, options, where)
    with telling(where, options):
        return cls(**arguments)


def _parts(options: Mapping[str, Any], field: Field, key: jax.Array, shared: dict[str, Any]) -> FieldParts:
    """The parameters of a row: what its group of the config names."""
    process, where = field.process, f"fields.{field.name}"

    def part(group: str, folder: str, **given: Any) -> Any:
        if not options.get(group):
            return None
        rngs = nnx.Rngs(stream(key, group))
        return build(folder, options[group], where=f"{where}.{group}", **shared, **given, rngs=rngs)

    inputs = field.spec if process is None else process.inputs
    outputs = numbers_of(field.spec) if process is None else process.outputs
    hint = None
    if field.hint:
        rngs = nnx.Rngs(stream(key, "hint"))
        hint = nnx.Linear(process.guided, shared["width"], use_bias=False, dtype=shared["dtype"], rngs=rngs)
    embed = part("embed", "models/embedders", spec=inputs)
    tied = {"table": _table(embed, where)} if (options.get("head") or {}).get("tied") else {}
    head = part("head", "models/heads", spec=field.spec, outputs=outputs, **tied)
    learned = part("learned", "models", spec=field.spec)
    return FieldParts(embed, head, codec=learned, hint=hint)


def _table(embed: Any, where: str) -> nnx.Embed:
    """The table that a tied head shares with the embedder of its field."""
    if not isinstance(getattr(embed, "table", None), nnx.Embed):
        raise ValueError(f"{where}.head.tied needs a table of ids to share: set {where}.embed.name='tokens', or untie")
    return embed.table


def numbers_of(spec: FieldSpec) -> int:
    """Numbers of a token's output without a process: a logit for each id, or for each value of each feature."""
    return (spec.vocab or 1) * (spec.features or 1)
