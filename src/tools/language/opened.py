"""The language model of a run, or of a folder of weights with its tokenizer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from src.build import build_system
from src.codecs.chain import Chain
from src.codecs.text import SPECIALS, Llama, SentencePiece
from src.common.files.checksums import fingerprints
from src.common.files.lazy_arrays import place
from src.common.files.paths import shown
from src.common.files.safetensors import SafeTensors
from src.common.mesh.sharding import make_mesh, replicated
from src.common.tree import flatten, listed, unflatten
from src.evals.language.elbo import Elbo, options_of
from src.evals.language.network import TextNetwork
from src.evals.language.text_model import TextModel
from src.interfaces import Field, FieldSpec, row_of
from src.models.build import build_architecture
from src.models.pretrained.about import RESERVED, TIED, about
from src.models.pretrained.hf_config import parse_config, read_config
from src.models.pretrained.initial_weights import Initial, is_initial
from src.models.pretrained.llama_weights import Published, check_complete
from src.sequence.segment import Segment
from src.train.average import used_params
from src.train.checkpoints.metadata import VERSION, checksum
from src.train.restored import restore_checkpoint
from src.train.setting import setting_of
from src.train.state import with_extras

FIELD = "text"  # of published weights


def open_run(
    config: Any,
    workdir: str,
    step: str = "latest",
    *,
    ema: bool | None = None,
    field: str = "",
    length: int | None = None,
    batch_size: int = 8,
    add_bos: bool = True,
    headers: bool | None = None,
    draws: int = 0,
) -> TextModel:
    """The language model of a run's checkpoint.

    ema      the averaged parameters; None: as `eval.ema` of the config says
    field    whose texts are scored; "": the one that the config trains by next-token prediction
    length   tokens of a row; None: the longest one of a task that trains the field so
    headers  see `TextModel`; None: as the templates of the config say
    draws    of the bound of each likelihood, under the diffusion that the config trains; 0: exact likelihoods, under
             next-token prediction

    Raises ValueError and FileNotFoundError, in one sentence, before parameters are read.
    """
    if ema is not None:
        config = config.copy_and_resolve_references()
        config.eval.ema = ema
    system = build_system(config)
    trained, way = _trained(system, bool(draws)), "diffusion" if draws else "next-token prediction"
    name = field or next(iter(trained), "")
    if len(trained) > 1 and not field:
        raise ValueError(f"{way} trains the fields {', '.join(trained)}: name one (field=…)")
    if name not in trained:
        raise ValueError(
            f"no task of the config trains {name or 'a field of texts'} by {way}, so it has no such likelihoods;"
            f" {listed(list(trained)) or 'no field'} can be scored"
        )
    elbo = Elbo(options_of(trained[name]), draws) if draws else None
    state = restore_checkpoint(system, workdir, step)
    params = used_params(state, system.config)
    kept = ("ema", "decay", "width", "weights")
    told = {name: value for name, value in setting_of(system.config, params).items() if name in kept}
    told = {"workdir": str(workdir), "step": int(state.step)} | told
    dtype = jnp.dtype(config.model.dtype)
    network = TextNetwork(
        system.architecture.bind,
        system.fields[name],
        with_extras(state, params),
        dtype,
        length or trained[name].length,
        batch_size,
    )
    if headers is None:
        headers = any(task.template.get("headers", False) for task in config.tasks.values())
    told |= _setting(network, add_bos) | ({"likelihood": "elbo", "draws": draws} if draws else {})
    return TextModel(network, add_bos, headers, told, elbo)


def open_weights(
    folder: str,
    *,
    tokenizer: str = "",
    length: int | None = None,
    batch_size: int = 8,
    add_bos: bool = True,
    headers: bool = False,
    dtype: str = "float32",
) -> TextModel:
    """The language model in a folder: of `config.json` and safetensors as published or exported, or one that
    `src.tools.convert` made to begin from. Images are left out of a MonoFormer.

    tokenizer  a tokenizer.model of sentencepiece, or its folder; "": the one in the folder, or above its `ema/`
    length     tokens of a row; None: `max_position_embeddings`
    dtype      of the computation; parameters are float32

    Raises ValueError and FileNotFoundError, in one sentence.
    """
    path = epath.Path(folder)
    if is_initial(path):
        leaves = Initial(path)
        config, made_for = parse_config(leaves.meta["published"], f"the config beside {shown(folder)}"), leaves.meta
        options = made_for["about"]
    elif (path / "config.json").exists():
        config = read_config(path)
        leaves = Published(SafeTensors(path), config.tied, config.family)
        check_complete(leaves, config)
        options = about(config)
    else:
        raise FileNotFoundError(
            f"{shown(folder)} has neither config.json nor weights.json: give a folder of published or converted weights"
            " (docs/weights.md), or a run by its config and workdir"
        )
    rows = leaves.shapes[f"fields/{FIELD}/embed/table/embedding"].shape[0]
    codec = _codec(path, tokenizer, rows, options.get(RESERVED, 0))
    field = Field(FIELD, FieldSpec(vocab=rows), Chain((codec,)))
    trunk = {key.removeprefix("model.trunk."): v for key, v in options.items() if key.startswith("model.trunk.")}
    model = {"dtype": dtype, "trunk": trunk, "conditioning": {"name": "conditioning:Conditioning"}, "time": {}}
    tied = options.get(TIED, False)
    parts = {"embed": {"name": "tokens"}, "head": {"name": "categorical", "tied": tied}}
    architecture, init = build_architecture(model, {FIELD: parts}, {FIELD: field})
    wanted = flatten(jax.eval_shape(init, jax.random.key(0)))
    if missing := [name for name in wanted if name not in leaves.shapes]:
        raise ValueError(f"{shown(folder)} lacks {listed(missing)}: give weights of a whole model")
    sharding = replicated(make_mesh({"data": -1})) if jax.device_count() > 1 else None
    params = unflatten({name: place(leaves, name, leaf.dtype, sharding) for name, leaf in wanted.items()})
    network = TextNetwork(
        architecture.bind, field, params, jnp.dtype(dtype), length or config.max_position_embeddings, batch_size
    )
    told = {"folder": str(folder), "weights": checksum(fingerprints(flatten(params)))}
    return TextModel(network, add_bos, headers, told | _setting(network, add_bos))


def _setting(network: TextNetwork, add_bos: bool) -> dict[str, Any]:
    return {
        "version": VERSION,
        "field": network.field.name,
        "tokenizer": network.field.codec.fingerprint,
        "dtype": network.dtype.name,
        "max_length": network.length,
        "add_bos_token": add_bos,
    }


def _trained(system: Any, noised: bool) -> dict[str, Segment]:
    """By field of ids, the longest segment that a task trains by next-token prediction, or, `noised`, by diffusion."""
    found: dict[str, Segment] = {}
    for plan in system.tasks.values():
        for objective, _ in plan.objectives.values():
            if not getattr(objective, "adds_noise" if noised else "predicts_next", False):
                continue
            for name in objective.names:
                row, length = row_of(name), sum(each.length + each.lead for each in plan.layout.segments)
                whole = Segment((name,), min(length, plan.layout.length))  # without noisy copies
                whole = plan.layout.segment(name) if noised else whole
                if hasattr(system.fields[row].codec.host, "bos"):
                    found[row] = max(found.get(row, whole), whole, key=lambda each: each.length)
    return found


def _codec(path: epath.Path, tokenizer: str, rows: int, reserved: int) -> Llama:
    """The tokenizer for a vocabulary of so many rows."""
    given = epath.Path(tokenizer) if tokenizer else path
    tried = [given] if given.is_file() else [given / "tokenizer.model", path.parent / "tokenizer.model"]
    file = next((each for each in tried if each.is_file()), None)
    if file is None:
        raise FileNotFoundError(
            f"there is no tokenizer.model in {shown(tokenizer or path)}: give the file of sentencepiece (tokenizer=…)"
        )
    pieces = SentencePiece(file).pieces
    if rows < pieces:
        raise ValueError(f"{shown(file)} has {pieces} pieces and the weights {rows} words: give their own tokenizer")
    codec = Llama(file, pieces, max(reserved, rows - pieces - len(SPECIALS)))
    if rows < codec.vocab_size:
        codec.pad = codec.unk  # a Llama without our special tokens has no row for padding, which is masked
    return codec
