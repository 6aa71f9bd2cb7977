"""PyTorch and transformers doing our work: the joint train step, guided drawing and greedy writing.

What is chosen in the peer's favour: sdpa attention with a mask made once a step, fused AdamW, `_foreach` for clipping
and the moving average, batches that are tensors beforehand, one thread or all, eager and `torch.compile` both timed,
and for drawing both ways: the prompt cached, and the whole row anew in every step as MonoFormer's published code does.
"""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import torch
import transformers
from transformers import DynamicCache

from src.interfaces import row_of
from src.objectives.diffusion import Diffusion
from src.objectives.next_token import NextToken
from src.tools.benchmarks.peers._model import Joint, load, places

TRIALS = 3
IGNORED = -100  # PyTorch's mark of a target that does not count


def check_supported(system: Any) -> tuple[str, str]:
    """The names of the fields of text and of images. Raises ValueError for what the peer does not do: anything but
    MonoFormer with straight-line flow in f32."""
    denoised = [name for name, field in system.fields.items() if field.process is not None]
    read = [name for name in system.fields if name not in denoised]
    if len(denoised) != 1 or len(read) != 1:
        raise ValueError(
            f"the peer does one field of text and one of images that are denoised, not {', '.join(system.fields)}"
        )
    (text,), (image,) = read, denoised
    model, words, pixels = system.config.model, system.config.fields[text], system.config.fields[image]
    wanted = {
        "model.dtype": (model.dtype, "float32"),
        "model.conditioning.name": (model.conditioning.name, "conditioning:TimeToken"),
        "model.trunk.norm": (model.trunk.norm, "rms"),
        "model.trunk.mlp": (model.trunk.mlp, "swiglu"),
        "model.trunk.rope": (model.trunk.rope, True),
        "model.trunk.rope_scaling": (tuple(model.trunk.rope_scaling), ()),
        "model.trunk.qkv_bias": (model.trunk.get("qkv_bias", False), False),
        "model.trunk.sliding_window": (model.trunk.get("sliding_window", 0), 0),
        "model.trunk.final_norm": (model.trunk.final_norm, True),
        "model.trunk.mot": (tuple(model.trunk.mot), ()),
        "model.lora.rank": (model.lora.rank, 0),
        f"fields.{text}.embed.name": (words.embed.name, "tokens"),
        f"fields.{text}.head.name": (words.head.name, "categorical"),
        f"fields.{image}.embed.name": (pixels.embed.name, "patches"),
        f"fields.{image}.head.name": (pixels.head.name, "adaln"),
        f"fields.{image}.head.order": (pixels.head.get("order", "crs"), "crs"),
        f"fields.{image}.head.unused_variance": (pixels.head.get("unused_variance", False), False),
        f"fields.{image}.process.name": (pixels.process.name, "gaussian:Gaussian"),
        f"fields.{image}.process.schedule.name": (pixels.process.schedule.name, "schedules:Linear"),
        f"fields.{image}.process.parameterization": (pixels.process.parameterization, "velocity"),
        f"fields.{image}.step.name": (pixels.step.name, "gaussian:Euler"),
        f"fields.{image}.time_token": (system.fields[image].time_token, True),
        "accumulate": (system.config.accumulate, 1),
    }
    for task, plan in system.tasks.items():
        roles = {s.role for s in plan.layout.segments} - {"clean", "noisy"} or [
            s for s in plan.layout.segments if s.names[1:]
        ]
        wanted[f"tasks.{task}.template.segment"] = (bool(roles), False)
        wanted[f"conditions of tasks.{task}"] = ([*plan.task.element_spec(1).cond], [])
        for label, (objective, _) in plan.objectives.items():
            plain = type(objective) is NextToken or (
                type(objective) is Diffusion and (objective.per, objective.given, objective.hint) == ("row", False, 0)
            )
            wanted[f"tasks.{task}.objectives.{label} beyond diffusion by row and next_token"] = (not plain, False)
    for name, (value, needed) in wanted.items():
        if value != needed:
            raise ValueError(f"the peer cannot do {name}={value!r}, only {needed!r}; leave out --peer or change it")
    (patch,) = system.fields[image].codec.device or (None,)
    if patch is None or system.fields[image].codec.frozen is not None:
        raise ValueError(f"the peer does images of pixels in patches; fields.{image}.codec has other links")
    return text, image


class Transformers:
    """A PyTorch model with our weights, its optimizer and its average.

    params    ours, by path
    rates     learning rate of each step
    """

    def __init__(self, system: Any, params: Mapping[str, np.ndarray], rates: Sequence[float]):
        self.text, self.image = check_supported(system)
        torch.set_num_threads(os.cpu_count() or 1)
        torch.manual_seed(system.config.seed)
        self.system, self.model, self.rates = system, Joint(system, self.text, self.image), list(map(float, rates))
        self.compiled = torch.compile(self.model, dynamic=False)
        self.parameters = list(self.model.parameters())
        self.reset(params)

    def reset(self, params: Mapping[str, np.ndarray]) -> None:
        """Starts anew from these parameters, at step 0."""
        load(self.model, params, self.text, self.image)
        c = self.system.config.optim
        self.step, self.ema = 0, [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters, c.lr, (c.b1, c.b2), c.eps, weight_decay=c.weight_decay, fused=True
        )

    def put(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch as tensors; a token's target is IGNORED where our objective does not count it, and `before` are the
        slots whose states predict the tokens of a text."""
        out: dict[str, Any] = {}
        for task, plan in self.system.tasks.items():
            rows, layout = batch[task], plan.layout
            slots = np.broadcast_to(np.arange(layout.length)[None, :, None], (plan.rows, layout.length, 1))
            out[task] = {}
            for segment in layout.segments:
                name, tokens = segment.name, rows.tokens[segment.name]
                counted = np.asarray(tokens.target) & np.asarray(tokens.valid)
                if row_of(name) == self.image:
                    images = torch.tensor(np.asarray(tokens.value))
                    out[task][name] = {"images": images, "target": torch.tensor(counted)}
                    continue
                before, exists = map(np.asarray, layout.before(rows, jnp.asarray(slots), name))
                if (before != before[:1]).any():
                    raise ValueError(f"the peer cannot do task {task}: texts follow padding of different lengths")
                kept = exists.any(axis=0)  # nothing stands before the first token of a row
                target = np.where(counted & exists, tokens.value, IGNORED)[:, kept]
                out[task][name] = {
                    "ids": torch.tensor(np.asarray(tokens.value, np.int64)),
                    "valid": torch.tensor(np.asarray(tokens.valid)),
                    "target": torch.tensor(np.asarray(target, np.int64)),
                    "before": torch.tensor(before[0, kept, 0].astype(np.int64)),
                }
        return out

    # ------------------------------------------------------------------ training

    def train(
        self, batch: Any, noise: Any = None, *, compiled: bool = False, as_published: bool = False
    ) -> dict[str, torch.Tensor]:
        """One step: loss, gradients, clipping, AdamW, average. Returns `total` and `grad_norm`."""
        c, ema = self.system.config.optim, self.system.config.ema
        self.optimizer.zero_grad(set_to_none=True)
        total = (self.compiled if compiled else self.model)(batch, noise or self.model.noise(), as_published)
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, c.grad_clip or float("inf"), foreach=True)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rates[min(self.step, len(self.rates) - 1)]
        self.optimizer.step()
        weight = max(1 - ema.decay, 9 / (10 + self.step)) if ema.warmup else 1 - ema.decay
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, self.parameters, weight)
        self.step += 1
        return {"total": total.detach(), "grad_norm": norm}

    @property
    def steps(self) -> dict[str, Callable[..., dict[str, torch.Tensor]]]:
        """The ways to make a step, by name: (batch, noise or None) -> measurements."""
        published = functools.partial(self.train, as_published=True)
        return {"eager": self.train, "compiled": functools.partial(self.train, compiled=True), "published": published}

    @staticmethod
    def noise(drawn: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Times and noise as tensors."""
        return {name: (torch.tensor(t), torch.tensor(eps)) for name, (t, eps) in drawn.items()}

    @staticmethod
    def fastest(action: Callable[[], Any]) -> tuple[int, Callable[[], Any]]:
        """One thread or all of them, whichever is faster for this action, and the action with that many.

        Small operations lose more to waiting for each other's threads than they win, all the more on a busy machine.
        """

        def run(threads: int) -> Any:
            torch.set_num_threads(threads)
            return action()

        def best(threads: int) -> float:
            run(threads)  # warm
            return min(_seconds(run, threads) for _ in range(TRIALS))

        threads = min(sorted({1, os.cpu_count() or 1}), key=best)
        return threads, functools.partial(run, threads)

    @staticmethod
    def versions() -> dict[str, Any]:
        """What is compared with."""
        return {"torch": torch.__version__, "transformers": transformers.__version__}

    # ------------------------------------------------------------------ drawing

    def drawing(
        self, plan: Any, given: Any, noise: np.ndarray, times: Sequence[float], scale: float
    ) -> dict[str, Callable[[], torch.Tensor]]:
        """The ways to draw, by name; see `draw`. given: the prompts' tokens `[B, N]`."""
        prompts = {"ids": torch.tensor(np.asarray(given.value, np.int64)), "valid": torch.tensor(given.valid)}
        start = torch.tensor(noise)
        return {
            name: functools.partial(self.draw, plan, prompts, start, times, scale, cached=cached)
            for name, cached in (("prompt_cached", True), ("whole_row", False))
        }

    @torch.inference_mode()
    def draw(self, plan: Any, given: Any, xt: torch.Tensor, times: Sequence[float], scale: float, *, cached: bool):
        """Patches `[B, N, P]` by Euler steps through `times`, guided unless scale is 1.

        plan   the task; its image comes after one text segment
        given  the prompts `{"ids", "valid"}` `[B, N]`, with guidance followed by as many empty ones
        cached: the prompt's keys and values are kept; otherwise every step runs the whole row
        """
        model, layout = self.model, plan.layout
        end = next(where.stop for name, where in places(layout).items() if row_of(name) == self.image)
        valid, length = given["valid"], given["valid"].shape[1]
        rows, new = valid.shape[0], end - length
        flags = torch.cat([valid, valid.new_ones(rows, new)], dim=1)
        see = getattr(model, f"see_{self.name_of(plan)}")[:end, :end] & flags[:, None, :]
        prompt = model.lm.model.embed_tokens(given["ids"])
        cache, count = DynamicCache(), valid.sum(1, keepdim=True)
        if cached:
            model.through(prompt, valid, see[:, :length, :length], cache)
        for t, s in itertools.pairwise(times):
            both = torch.cat([xt, xt]) if scale != 1 else xt
            vector = model.vector(both.new_full((1, 1), t)).expand(rows, 1, -1)
            image = model.image(both, vector)
            if cached:
                hidden = model.through(image, flags[:, length:], see[:, length:], cache, count)
                cache.crop(-new)
            else:
                hidden = model.through(torch.cat([prompt, image], dim=1), flags, see)
            velocity = model.velocity(hidden[:, 1 - new :], vector)
            if scale != 1:
                cond, null = velocity.chunk(2)
                velocity = null + scale * (cond - null)
            xt = xt + (s - t) * velocity
        return xt

    def name_of(self, plan: Any) -> str:
        """The name of a task of the system."""
        return next(name for name, other in self.system.tasks.items() if other is plan)

    # ------------------------------------------------------------------ writing

    @torch.inference_mode()
    def write(self, starts: Sequence[Sequence[int]], tokens: int) -> torch.Tensor:
        """Ids `[B, tokens]` that follow the beginnings, greedily, by `generate` with its key-value cache."""
        longest, pad = max(map(len, starts)), self.system.fields[self.text].codec.host.pad
        ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in starts])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in starts])
        out = self.model.lm.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, use_cache=True
        )
        return out[:, longest:]


def _seconds(action: Callable[..., Any], *args: Any) -> float:
    began = time.perf_counter()
    action(*args)
    return time.perf_counter() - began
