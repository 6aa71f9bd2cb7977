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

import numpy as np
import torch
import transformers
from transformers import DynamicCache

from src.objectives.diffusion import Diffusion
from src.objectives.next_token import NextToken
from src.tools.benchmarks.peers._model import Joint, load

TRIALS = 3
IGNORED = -100  # PyTorch's mark of a target that does not count


def check_supported(system: Any) -> None:
    """Raises ValueError for what the peer does not do: anything but MonoFormer with straight-line flow in f32."""
    model, process = system.config.model, system.config.process
    wanted = {
        "model.dtype": (model.dtype, "float32"),
        "model.conditioning.name": (model.conditioning.name, "conditioning:TimeToken"),
        "model.trunk.norm": (model.trunk.norm, "rms"),
        "model.trunk.mlp": (model.trunk.mlp, "swiglu"),
        "model.trunk.rope": (model.trunk.rope, True),
        "model.trunk.final_norm": (model.trunk.final_norm, True),
        "model.image_head.variance": (model.image_head.variance, "none"),
        "model.image_head.order": (model.image_head.order, "crs"),
        "process.schedule.name": (process.schedule.name, "schedules:Linear"),
        "process.parameterization": (process.parameterization, "velocity"),
        "sample.image.sampler.name": (system.config.sample.image.sampler.name, "gaussian:Euler"),
        "accumulate": (system.config.accumulate, 1),
    }
    for name, (value, needed) in wanted.items():
        if value != needed:
            raise ValueError(f"the peer cannot do {name}={value!r}, only {needed!r}; leave out --peer or change it")
    kinds = {type(o) for plan in system.tasks.values() for o, _ in plan.objectives.values()}
    if kinds - {Diffusion, NextToken} or system.codec is None or system.encode is None:
        raise ValueError("the peer does rows of text and images with the objectives diffusion and next_token only")


class Transformers:
    """A PyTorch model with our weights, its optimizer and its average.

    params    ours, by path
    rates     learning rate of each step
    """

    def __init__(self, system: Any, params: Mapping[str, np.ndarray], rates: Sequence[float]):
        check_supported(system)
        torch.set_num_threads(os.cpu_count() or 1)
        torch.manual_seed(system.config.seed)
        self.system, self.model, self.rates = system, Joint(system, system.codec.vocab_size), list(map(float, rates))
        self.compiled = torch.compile(self.model, dynamic=False)
        self.parameters = list(self.model.parameters())
        self.reset(params)

    def reset(self, params: Mapping[str, np.ndarray]) -> None:
        """Starts anew from these parameters, at step 0."""
        load(self.model, params)
        c = self.system.config.optim
        self.step, self.ema = 0, [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters, c.lr, (c.b1, c.b2), c.eps, weight_decay=c.weight_decay, fused=True
        )

    def put(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """A batch as tensors; a token's target is IGNORED where our objective does not count it."""
        out: dict[str, Any] = {}
        for task, plan in self.system.tasks.items():
            out[task], before = {}, np.zeros((plan.rows, 1), bool)  # whether the place before is there
            for segment in plan.layout.segments:
                if segment.kind == "text":
                    field = batch[task][segment.name]
                    exists = np.concatenate([before, np.asarray(field.valid)[:, :-1]], axis=1)
                    target = np.where(field.loss & field.valid & exists, field.ids, IGNORED)
                    values = {"ids": field.ids, "valid": field.valid, "target": target}
                    out[task][segment.name] = {
                        k: torch.tensor(np.asarray(v, bool if k == "valid" else np.int64)) for k, v in values.items()
                    }
                    before = np.asarray(field.valid)[:, -1:]
                else:
                    before = np.ones((plan.rows, 1), bool)
                    if segment.kind == "image":
                        out[task][segment.name] = torch.tensor(np.asarray(batch[task][segment.name].values))
        return out

    # ------------------------------------------------------------------ training

    def train(self, batch: Any, noise: Any = None, *, compiled: bool = False) -> dict[str, torch.Tensor]:
        """One step: loss, gradients, clipping, AdamW, average. Returns `total` and `grad_norm`."""
        c, ema = self.system.config.optim, self.system.config.ema
        self.optimizer.zero_grad(set_to_none=True)
        total = (self.compiled if compiled else self.model)(batch, noise or self.model.noise())
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
        return {"eager": self.train, "compiled": functools.partial(self.train, compiled=True)}

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
        """The ways to draw, by name; see `draw`. given: prompts `[B, N]` with `ids` and `valid`."""
        shown = {"ids": torch.tensor(np.asarray(given.ids, np.int64)), "valid": torch.tensor(given.valid)}
        start = torch.tensor(noise)
        return {
            name: functools.partial(self.draw, plan, shown, start, times, scale, cached=cached)
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
        end = next(s.stop for name, s in layout.slices().items() if name in layout.named("image"))
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
        longest, pad = max(map(len, starts)), self.system.codec.pad
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
