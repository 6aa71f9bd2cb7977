"""What `src.tools.convert` does: finds out what a source is, imports, exports, and describes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

from src.codecs.chain import build_chain
from src.codecs.patch import Patch
from src.codecs.text import SPECIALS as WORDS
from src.common.files.lazy_arrays import Leaves
from src.common.files.paths import shown
from src.common.files.safetensors import SafeTensors
from src.common.files.safetensors_writer import SHARD_BYTES, check_room
from src.common.files.strict_json import read_json
from src.common.tree import listed
from src.models import lora
from src.models.pretrained.about import BIDIRECTIONAL, ORDER, RESERVED, TIED, about, about_run, links_of, made_at_once
from src.models.pretrained.dit_weights import PublishedDiT, is_dit
from src.models.pretrained.export import (
    PIXELS,
    Headless,
    check_exportable,
    published_config,
    write_config,
    write_published,
    write_settings,
)
from src.models.pretrained.families import MONOFORMER, Family
from src.models.pretrained.hf_config import parse_config, read_config
from src.models.pretrained.hf_vision_config import FIELDS as VISION
from src.models.pretrained.hf_vision_config import vision_fields
from src.models.pretrained.initial_weights import Initial, is_initial, summary, write_initial
from src.models.pretrained.llama_weights import (
    IMAGE,
    PROJECTOR,
    TABLE,
    Grown,
    Published,
    check_complete,
    expected,
)
from src.tools.conversion.ends import Ends, ends_of_run, other_ends, write_ends
from src.tools.conversion.hub import download, is_hub_name
from src.tools.conversion.info import not_read, unread
from src.tools.conversion.tokenizer import copy_tokenizer, name_special_tokens
from src.tools.conversion.trained import find_trained, write_trained
from src.tools.conversion.vision_tower import tower_tensors
from src.tools.conversion.words import VocabularyRows, has_special_tokens, pieces_of, words_of

EMA = "ema"
SPECIALS = len(WORDS)  # that a Llama gets


@dataclasses.dataclass(frozen=True)
class Options:
    """The flags of `src.tools.convert` that shape what is written."""

    new_words: int | None = None
    new_rows: str = "normal"
    seed: int = 0
    step: str = "latest"
    ema: bool = False
    decay: float = 0.0
    width: float = 0.0
    initial: bool = False
    dtype: str | None = None
    image_size: int | None = None
    tokenizer: str | None = None
    network: str | None = None
    heads: int | None = None
    shard_bytes: int = SHARD_BYTES


class Weights(NamedTuple):
    """Where something is, and what: `initial`, `run`, `published`, `dit`, `vae`, `clip` or `tensors`."""

    path: epath.Path
    kind: str


def find(name: str, revision: str | None = None) -> Weights:
    """What a path is, or a repository of the hub once it is here.

    Raises FileNotFoundError, ImportError, OSError and ValueError, in one sentence.
    """
    path = epath.Path(name)
    if not path.exists():
        if "://" in name or not is_hub_name(name):
            raise FileNotFoundError(f"there is no {shown(name)}: give a folder, or owner/name of the Hugging Face hub")
        path = download(name, revision)
    if path.is_dir() and is_initial(path):
        return Weights(path, "initial")
    if path.is_dir() and (path / "checkpoints").is_dir():
        return Weights(path, "run")
    if not path.is_dir() or not (path / "config.json").exists():
        tensors = SafeTensors(path)  # says what is there instead, and of what may run code how to convert it
        return Weights(path, "dit" if is_dit(tensors.entries) else "tensors")
    fields = read_json(path / "config.json", what="config")
    fields = fields if isinstance(fields, dict) else {}
    if fields.get("_class_name") == "AutoencoderKL":
        return Weights(path, "vae")
    if str(fields.get("model_type")).startswith("clip"):
        return Weights(path, "clip")
    return Weights(path, "published")


def check_empty(out: str) -> None:
    """Raises ValueError unless a folder is new or empty."""
    path = epath.Path(out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"--out={out} is there already and not empty: give another folder, or remove it")


def convert(source: Weights, out: str, options: Options) -> Iterator[str]:
    """Writes `out`, and says line by line what was done. Raises as its parts do, before anything is written where the
    source or an option is wrong."""
    if source.kind == "published":
        yield from _import(source.path, epath.Path(out), options)
    elif source.kind == "dit":
        yield from _import_dit(source.path, epath.Path(out), options)
    elif options.initial:
        if source.kind != "run":
            raise ValueError(f"--initial is for the workdir of a run, and {shown(source.path)} is none")
        yield from write_trained(find_trained(source.path, options), out, options.shard_bytes)
    elif source.kind in ("initial", "run"):
        yield from _export(source, epath.Path(out), options)
    elif source.kind in ("vae", "clip"):
        raise ValueError(f"{shown(source.path)} needs no conversion: configs read that folder as it is (see --info)")
    else:
        raise ValueError(
            f"{shown(source.path)} has no config.json beside its tensors, and they are no DiT's or SiT's: give the "
            "folder that has both"
        )


# --------------------------------------------------------------------------- in


def _import(path: epath.Path, out: epath.Path, options: Options) -> Iterator[str]:
    jobs = [(path, out)] + ([(path / EMA, out / EMA)] if (path / EMA / "config.json").exists() else [])
    words = words_of(path, options.new_words)
    ready = [(_published(folder, words, options), target) for folder, target in jobs]
    check_room(_existing(out), sum(summary(leaves.shapes)["bytes"] for (leaves, *_), _ in ready))
    for (leaves, made_for, fields), target in ready:
        name = write_initial(target, leaves, made_for, fields, options.shard_bytes)
        told = summary(leaves.shapes)
        yield f"{target}: {told['parameters']:,} parameters, {_dtypes(told)}, hash {name}"
    yield from (line for folder, _ in jobs for line in not_read(folder))
    yield from other_ends(path)
    copied = copy_tokenizer(path, out)
    lacking, codec = "", "text:Llama"
    if "tokenizer.model" not in copied and "tokenizer.json" in copied and words.pieces:
        lacking, codec = "; no tokenizer.model: the codec tokenizer_json reads such texts", "tokenizer_json"
    elif copied and "tokenizer.model" not in copied:
        lacking = "; no tokenizer.model, which the text codecs read"
    yield f"tokenizer files: {', '.join(copied) or 'none there'}{lacking}"
    (leaves, *_), _ = ready[0]
    if copied and words.special:
        yield from _name_special_tokens(out, leaves.shapes[TABLE].shape[0], words.pieces)
    if words.reserved:
        yield (
            f"{words.reserved} rows lie between the tokenizer's pieces and the special tokens: set "
            f"fields.text.codec.reserved={words.reserved} (and pieces={words.pieces} of {codec})"
        )


def _import_dit(path: epath.Path, out: epath.Path, options: Options) -> Iterator[str]:
    tensors = SafeTensors(path)
    leaves = PublishedDiT(tensors, options.network, options.heads)
    told = summary(leaves.shapes)
    check_room(_existing(out), told["bytes"])
    name = write_initial(out, leaves, leaves.about(), None, options.shard_bytes)
    yield f"{out}: {told['parameters']:,} parameters, {_dtypes(told)}, hash {name}"
    yield from unread(tensors)


def _published(
    path: epath.Path, words: VocabularyRows, options: Options
) -> tuple[Leaves, dict[str, Any], dict[str, Any]]:
    config = read_config(path)
    found = Published(SafeTensors(path), config.tied, config.family)
    check_complete(found, config)
    image = config.image
    if image and not (image.use_pos_embed and image.use_adaln_final_layer):
        raise ValueError(
            f"the config {shown(path / 'config.json')} has use_pos_embed={image.use_pos_embed} and "
            f"use_adaln_final_layer={image.use_adaln_final_layer}, and here both are true only: give other weights"
        )
    made_for = about(config) | ({RESERVED: words.reserved} if words.reserved else {})
    fields = read_json(path / "config.json", what="config")
    return Grown(found, words.new, options.new_rows, options.seed, config.tied), made_for, fields


def _name_special_tokens(folder: epath.Path, rows: int, pieces: int | None) -> Iterator[str]:
    """Names the last rows of a vocabulary in its tokenizer's files."""
    moved = name_special_tokens(folder, rows - SPECIALS, pieces)
    if moved:
        yield (
            f"{folder}: the words {', '.join(moved)} of the tokenizer keep their rows and get other names in its files,"
            f" because the special tokens {', '.join(WORDS)} have these"
        )


# --------------------------------------------------------------------------- out


class Job(NamedTuple):
    """What one exported folder is made of; see `published_config` for the last three."""

    leaves: Leaves
    made_for: Mapping[str, Any]
    base: Mapping[str, Any]
    patch: int
    side: int
    target: epath.Path

    @property
    def family(self) -> Family:
        """What it becomes. Raises as `check_exportable`."""
        return check_exportable(self.leaves, self.made_for, (self.base.get("architectures") or [None])[0])


def _export(source: Weights, out: epath.Path, options: Options) -> Iterator[str]:
    jobs, tokenizer = (_initial_jobs if source.kind == "initial" else _run_jobs)(source.path, out, options)
    jobs = [job._replace(leaves=Headless(job.leaves)) if job.made_for.get(TIED) else job for job in jobs]
    configs = [_config(job, source, options) for job in jobs]  # all of them before anything is written
    towers = [tower_tensors(fields, PROJECTOR in job.leaves.shapes) for job, fields in zip(jobs, configs, strict=True)]
    for job, fields, (tower, warning) in zip(jobs, configs, towers, strict=True):
        order, size = job.made_for.get(ORDER, "rsc"), options.shard_bytes
        files = write_published(job.target, job.leaves, order, job.patch, options.dtype, size, tower, job.family)
        write_config(job.target, fields)
        told = summary(job.leaves.shapes)
        yield f"{job.target}: {fields['architectures'][0]}, {told['parameters']:,} parameters, {', '.join(files)}"
        if warning:
            yield f"{job.target}: {warning}"
    images = configs[0]["architectures"] == [MONOFORMER.architecture]
    if images:
        write_settings(out, configs[0])
    tokenizer = options.tokenizer or tokenizer
    copied = copy_tokenizer(tokenizer, out) if tokenizer else []
    yield f"tokenizer files: {', '.join(copied) or 'none there (see --tokenizer)'}"
    bos, eos = (configs[0].get(name) for name in ("bos_token_id", "eos_token_id"))
    if source.kind == "run" and type(bos) is type(eos) is int:
        yield from write_ends(out, Ends(bos, eos))
    rows, pieces = jobs[0].leaves.shapes[TABLE].shape[0], pieces_of(out)
    trained = source.kind == "run" or images  # with our text codec
    if copied and has_special_tokens(out, rows, pieces, trained):
        yield from _name_special_tokens(out, rows, pieces)


def _config(job: Job, source: Weights, options: Options) -> dict[str, Any]:
    """The fields of config.json, once everything fits."""
    shapes = job.leaves.shapes
    family = job.family
    fields = published_config(job.leaves, job.made_for, job.base, job.patch, job.side, options.dtype, family)
    wanted = expected(shapes, parse_config(fields, f"the config that {shown(source.path)} would get"))
    wrong = sorted(path for path in {*shapes, *wanted} if path not in shapes or shapes[path].shape != wanted.get(path))
    if wrong:
        raise ValueError(
            f"{shown(source.path)} is no whole {family.architecture}: {listed(wrong, 100)} are missing or of other "
            "shapes than its config says"
        )
    return fields


def _initial_jobs(path: epath.Path, out: epath.Path, options: Options) -> tuple[list[Job], Any]:
    """Of initial weights, and of their average where it is beside them; and where their tokenizer is."""
    folders = [(path, out)] + ([(path / EMA, out / EMA)] if is_initial(path / EMA) else [])
    jobs = []
    for folder, target in folders:
        leaves = Initial(folder)
        base = leaves.meta["published"]
        patch, size = (base.get(name) for name in ("patch_size", "image_size"))
        patch = patch if type(patch) is int and patch > 0 else 2
        size = options.image_size or (size if type(size) is int else 0)
        jobs.append(Job(leaves, leaves.meta["about"], base, patch, size // PIXELS, target))
    return jobs, path


def _run_jobs(path: epath.Path, out: epath.Path, options: Options) -> tuple[list[Job], Any]:
    """Of a checkpoint of a run; and where its tokenizer is."""
    run = find_trained(path, options)
    adapters = run.config["model"].get("lora", {})
    leaves = lora.Merged(run, adapters["alpha"]) if adapters.get("rank") else run
    images = any(path.startswith(f"{IMAGE}/") for path in run.shapes)
    base, tokenizer = _base(run.config)
    base = {name: value for name, value in base.items() if name not in VISION}
    base |= vision_fields(links_of(run.config["fields"].get("vision", {}).get("codec") or {}))
    base |= {BIDIRECTIONAL: made_at_once(run.config, base.get(BIDIRECTIONAL, True))} if images else {}
    ends = ends_of_run(run.config)
    base |= {"bos_token_id": ends.bos, "eos_token_id": ends.eos} if ends else {}
    patch, side = _sizes(run.config, options.image_size) if images else (0, 0)
    return [Job(leaves, about_run(run.config, images), base, patch, side, out)], tokenizer


def _base(config: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The published config.json that a run began from, where that is still there, and where its tokenizer is."""
    path = (config.get("init_from") or {}).get("path")
    codec = links_of(config["fields"].get("text", {}).get("codec") or {}).get("host", {})
    folder = os.path.dirname(codec["path"]) if codec.get("path") else None
    if path and is_initial(path):
        return Initial(path).meta["published"], folder or path
    return {}, folder


def _sizes(config: Mapping[str, Any], image_size: int | None) -> tuple[int, int]:
    """The side of a patch and of the latents (or pixels) that a run makes, in their elements."""
    where = "fields.image.codec"
    try:
        links = build_chain(config["fields"]["image"]["codec"], where, _nothing).device
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(f"the run's images are not known: {error}") from error
    if not links or not isinstance(links[0], Patch) or len(links) > 1:
        raise ValueError(f"the run cannot be published: MonoFormer's images are patches, and {where} makes others")
    height, width = links[0].height, links[0].width
    if image_size is None and height != width:
        raise ValueError("the run's images are not square: give --image_size, which is one number")
    return links[0].size, image_size // PIXELS if image_size else height


def _nothing(what: str, link: Any) -> Any:
    raise ValueError(f"a codec learns from the {what} of the run, which are not here")


# --------------------------------------------------------------------------- what is there


def info(source: Weights) -> str:
    """What a source holds, in lines."""
    from src.tools.conversion.info import describe

    return describe(source)


def _dtypes(told: Mapping[str, Any]) -> str:
    return ", ".join(sorted(told["dtypes"]))


def _existing(path: epath.Path) -> epath.Path:
    """The path, or the first folder above it that is there."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
