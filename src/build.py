"""From a config to a system: look names up by path, put the pieces together, say in words what does not fit."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from src.codecs.patch import Patch
from src.common.files.store import cache_folder
from src.common.lookup import build, lookup
from src.data.pipeline.stream import split_batch
from src.interfaces import Objective, Process, Task
from src.models.build import Fields, build_model
from src.models.model import bind
from src.sampling.generate import ImageSampler, TextSampler
from src.sampling.guidance import Guidance
from src.sampling.pipeline import Predictor
from src.sequence.layout import Layout, with_time_tokens
from src.sequence.packed import Document
from src.train.encode_batch import Frozen
from src.train.init_from import make_start
from src.train.system import System, TaskPlan


def build_system(config: Any) -> System:
    """Everything that a run needs except devices and parameters. Cheap: no parameter is allocated.

    Raises ValueError, in one sentence, for unknown names and for combinations that mean nothing.
    """
    check_numbers(config)
    codec = build_codec(config)
    frozen = build_frozen(config)
    tasks = {name: build_task(name, c.data, codec, frozen, config) for name, c in config.tasks.items()}
    frozen = dataclasses.replace(frozen, buckets={n: t.buckets for n, t in tasks.items() if hasattr(t, "buckets")})
    patch = build_patch(config, tasks, frozen)
    process = build_process(config)
    fields = Fields(
        vocab=codec.vocab_size if codec else None,
        patch_features=patch.features if patch else None,
        channels=patch.channels if patch else None,
        grid=patch.grid if patch else None,
        classes=next((t.classes for t in tasks.values() if t.classes is not None), None),
        vision_features=frozen.vision.features if frozen.vision else None,
    )
    graph, init = build_graph(config, fields)
    rows = split_batch(config.batch, {n: c.share for n, c in config.tasks.items()}, multiple=1)
    learned = {
        "head": config.model.image_head.variance == "learned",
        "process": config.process.variance == "learned_range",
    }
    if patch and learned["head"] != learned["process"]:
        raise ValueError(
            f"model.image_head.variance={config.model.image_head.variance!r} does not go with process.variance="
            f"{config.process.variance!r}; use 'learned' with 'learned_range', else 'none' with 'fixed_small'"
        )
    time_tokens = patch and lookup("models", config.model.conditioning.name).tokens  # no time without an image
    plans = {}
    for name, task in tasks.items():
        layout = getattr(task, "layout", None) or Layout(task.segments)
        objectives = {k: build_objective(c, process) for k, c in config.tasks[name].objectives.items()}
        check_task(name, layout, objectives)
        plans[name] = TaskPlan(task, with_time_tokens(layout) if time_tokens else layout, rows[name], objectives)
    predictor = build_predictor(config, graph, plans, patch, process, codec, frozen)
    evaluators = {n: build("evals", c, tasks=tasks) for n, c in config.eval.evaluators.items()}
    encode = patch.encode if patch else _no_images
    return System(config, graph, init, plans, encode, evaluators, predictor, codec, frozen, make_start(config))


AT_LEAST_ONE = (
    "steps",
    "batch",
    "accumulate",
    "guard.patience",
    "log.every",
    "sample.rows",
    "sample.longest",
    "sample.image.steps",
)
AT_LEAST_ZERO = (
    "seed",
    "eval.every",
    "checkpoint.every",
    "guard.spike",
    "guard.restores",
    "data.workers",
    "data.max_bad.share",
    "data.max_bad.least",
    "sample.image.guidance.channels",
    "doctor.every",
    "doctor.panels",
    "doctor.batches",
    "doctor.drawings",
)


def check_numbers(config: Any) -> None:
    """Raises ValueError for a number that is too small to mean anything."""
    for names, least in ((AT_LEAST_ONE, 1), (AT_LEAST_ZERO, 0)):
        for name in names:
            value = functools.reduce(getattr, name.split("."), config)
            if value < least:
                raise ValueError(f"the config has {name}={value}; it must be at least {least}")
    if config.seed >= 2**32:
        raise ValueError(f"the config has seed={config.seed}; it must be below 2^32")


def build_codec(config: Any) -> Any:
    """The text codec, or None; a sentencepiece model without a path is trained on the tasks' own text and cached."""
    settings = dict(config.text_codec)
    if not settings.get("name"):
        return None
    cls = lookup("codecs", settings["name"])
    if not hasattr(cls, "cached") or settings.get("path"):
        sized = {"pieces"} & set(inspect.signature(cls.__init__).parameters)
        return build("codecs", {k: v for k, v in settings.items() if k in {"name", "path", *sized} and v})
    texts: dict[str, None] = {}
    for task in config.tasks.values():
        source = lookup("data", task.data.name)
        texts |= dict.fromkeys(source.texts() if hasattr(source, "texts") else ())
    if not texts:
        raise ValueError("text_codec has no path and no task brings text to train it on; set text_codec.path")
    folder = settings.get("folder") or os.path.join(cache_folder(), "tokenizers")
    try:
        return cls.cached(tuple(texts), settings["vocab_size"], folder)
    except OSError as error:
        raise OSError(
            f"the tokenizer cannot be kept in {folder} ({error}); set XDG_CACHE_HOME to a writable folder"
        ) from error


def build_frozen(config: Any) -> Frozen:
    """The networks that are used and not trained; nothing is read."""
    settings = ("codecs", dict(config.image_codec)), ("codecs", dict(config.vision))
    image, vision = (build(folder, {k: v for k, v in group.items() if k != "path" or v}) if group.get("name") else None
                     for folder, group in settings)  # fmt: skip
    return Frozen(image, vision)


def build_task(name: str, data: Any, codec: Any, frozen: Frozen, config: Any) -> Task:
    """One data task; it gets the codec, the encoder of what is understood, and the size of a patch in the units of its
    images, when it asks for them."""
    cls = lookup("data", data.name)
    known = [inspect.signature(c.__init__).parameters for c in reversed(cls.__mro__) if c is not object]
    accepted = {name: parameter for parameters in known for name, parameter in parameters.items()}
    extra = {"codec": codec, "patch": config.patch.size, "vision": frozen.vision}
    options = {k: v for k, v in dict(data).items() if k != "name"}
    unknown = sorted(set(options) - set(accepted))
    if unknown:
        raise ValueError(f"tasks.{name}.data: {cls.__name__} has no option {unknown[0]!r}; it has {sorted(accepted)}")
    if "codec" in accepted and codec is None:
        raise ValueError(f"tasks.{name} has text, but text_codec.name is empty; set it, e.g. to 'text:SentencePiece'")
    if frozen.vision is None and "vision" in accepted and accepted["vision"].default is inspect.Parameter.empty:
        raise ValueError(f"tasks.{name} shows images, but vision.name is empty; set it, e.g. to 'vision:Clip'")
    bucketed = frozen.image and "buckets" in accepted
    if bucketed and frozen.image.encodes(options.get("channels", accepted["channels"].default)):
        extra["patch"] *= frozen.image.factor  # at once, since such a task compares its grids with its size
    try:
        task = cls(**{k: v for k, v in extra.items() if k in accepted}, **options)
        if frozen.image and task.image_shape and "patch" in accepted:
            scale = task.image_shape[0] // frozen.image.shape(task.image_shape)[0]
            if scale > 1 and not bucketed:  # the patches are those of the latents
                extra["patch"] *= scale
                task = cls(**{k: v for k, v in extra.items() if k in accepted}, **options)
        return task
    except (ValueError, TypeError) as error:
        raise ValueError(f"tasks.{name}: {error}") from error


def build_patch(config: Any, tasks: Mapping[str, Task], frozen: Frozen) -> Patch | None:
    """The device codec of the images, or of their latents; all tasks of a system share one shape."""
    shapes = {t.image_shape for t in tasks.values() if t.image_shape is not None}
    shapes = {frozen.image.shape(shape) for shape in shapes} if frozen.image else shapes
    if len(shapes) > 1:
        raise ValueError(f"the tasks have images of several shapes, {sorted(shapes)}; one system has one shape")
    if not shapes:
        return None
    height, width, channels = shapes.pop()
    return Patch(height=height, width=width, channels=channels, **dict(config.patch))


def build_process(config: Any) -> Process:
    """The corruption process with its schedule."""
    settings = dict(config.process)
    return build("corruption", {k: v for k, v in settings.items() if k != "schedule"},
                 schedule=build("corruption", settings["schedule"]))  # fmt: skip


def build_objective(settings: Any, process: Process) -> tuple[Objective, float]:
    """An objective and its weight in the sum."""
    settings = dict(settings)
    weight = settings.pop("weight")
    cls = lookup("objectives", settings["name"])
    extra: dict[str, Any] = {}
    if "process" in inspect.signature(cls.__init__).parameters:
        extra = {
            "process": process,
            "times": build_times(settings.pop("times")),
            "weight": build("objectives/losses", settings.pop("loss_weight")),
        }
    return build("objectives", settings, **extra), float(weight)


def build_times(settings: Any) -> Any:
    """A time sampler; `base` may nest another one."""
    settings = dict(settings)
    if "base" in settings:
        return build(
            "corruption", {k: v for k, v in settings.items() if k != "base"}, base=build_times(settings["base"])
        )
    return build("corruption", settings)


def build_graph(config: Any, fields: Fields) -> tuple[nnx.GraphDef, Any]:
    """The model without its parameters, and the function key -> parameters."""

    def make(key: jax.Array) -> Any:
        return nnx.split(build_model(config.model.to_dict(), fields, nnx.Rngs(key)))

    try:
        graph, _ = nnx.eval_shape(make, jax.random.key(0))
    except TypeError as error:
        raise ValueError(f"config.model has an option that its part does not know: {error}") from error
    return graph, lambda key: nnx.to_pure_dict(make(key)[1])


def check_task(name: str, layout: Layout, objectives: Mapping[str, tuple[Objective, float]]) -> None:
    """Every objective must own segments of the layout."""
    if not objectives:
        raise ValueError(f"tasks.{name} has no objective; nothing would be learned from it")
    have = [s.name for s in layout.segments]
    for label, (objective, _) in objectives.items():
        missing = [f for f in objective.fields if f not in have]
        if missing:
            raise ValueError(f"tasks.{name}.objectives.{label} reads {missing}, but the task has the segments {have}")


def build_predictor(
    config: Any,
    graph: nnx.GraphDef,
    plans: Mapping[str, TaskPlan],
    patch: Patch | None,
    process: Process,
    codec: Any,
    frozen: Frozen,
) -> Predictor:
    """How the system samples. A task generates the last segment that one of its objectives owns."""
    image = text = None
    if patch:
        settings = config.sample.image
        guidance = Guidance(**{**settings.guidance, "channels": settings.guidance.channels or None})
        if guidance.channels and guidance.channels > patch.channels:
            raise ValueError(
                f"sample.image.guidance.channels={guidance.channels}, but the images have {patch.channels}; lower it"
            )
        sampler = build("sampling/steps", settings.sampler)
        image = ImageSampler(process, sampler, settings.steps, guidance, patch.features, patch.size**2)
    if codec:
        text = TextSampler(build("sampling/steps", config.sample.text), codec.eos, codec.pad)
    tasks = {}
    for name, plan in plans.items():
        owned = {f for objective, _ in plan.objectives.values() for f in objective.fields}
        last = [s.name for s in plan.layout.segments if s.name in owned][-1]
        layout = _sampled(plan, last)
        if layout is not None:
            tasks[name] = (plan.task, layout, last)
    return Predictor(
        bind=functools.partial(bind, graph),
        tasks=tasks,
        encode=patch.encode if patch else _no_images,
        decode=patch.decode if patch else _no_images,
        shaped=lambda grid: patch.shaped(grid).decode if patch else _no_images,
        codec=codec,
        image=image,
        text=text,
        shape=_drawn(patch, frozen),
        shown=frozen.shown,
        pictures=frozen.pictures,
        rows=config.sample.rows,
        longest=config.sample.longest,
    )


def _sampled(plan: TaskPlan, name: str) -> Layout | None:
    """The layout in which a task's segment is generated, or None: packed rows are generated one example at a time."""
    if not isinstance(plan.layout, Document):
        return plan.layout
    layout = plan.task.sampled(name)
    return with_time_tokens(layout) if layout and plan.layout.time else layout


def _drawn(patch: Patch | None, frozen: Frozen) -> tuple[int, int, int] | None:
    """Shape (h, w, C) of the images that are drawn."""
    if patch is None:
        return None
    shape = (patch.height, patch.width, patch.channels)
    return frozen.image.picture(shape) if frozen.image else shape


def _no_images(values: Any) -> Any:
    raise ValueError("this system has no images")
