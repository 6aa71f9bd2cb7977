"""The PyTorch model of a peer: the causal language model of transformers with the same embedders and heads as ours.

Its trunk is `LlamaForCausalLM`, or `Qwen3ForCausalLM` where q and k are normalized per head, which is Llama with
exactly that. The parts around it are ours, said in PyTorch; shapes as in `src/interfaces.py`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from src.interfaces import Layout, SequenceSpec, row_of
from src.models.layers import sincos_2d
from src.objectives.diffusion import Diffusion
from src.sequence.mask import visible

TIME_FEATURES = 256
HIDDEN = float(torch.finfo(torch.float32).min)


def allowed(layout: Layout) -> torch.Tensor:
    """Who sees whom in a row without padding, `[S, S]` bool, from our own rule."""
    read, write, group = layout.static_orders()
    spec = SequenceSpec(read, write, group, np.ones(layout.length, np.int32), np.arange(layout.length)[:, None])
    return torch.tensor(np.asarray(visible(spec, spec)))


def places(layout: Layout) -> dict[str, slice]:
    """Where the tokens of each name lie."""
    found = {}
    for segment in layout.segments:
        part = layout.part(segment.name, "clean")
        found[segment.name] = slice(part.start, part.start + part.length)
    return found


class Joint(nn.Module):
    """Text and noised images through one trunk; `forward` is the weighted loss of one batch.

    system       ours, already checked by `transformers.check_supported`
    text, image  names of the two fields
    """

    def __init__(self, system: Any, text: str, image: str):
        super().__init__()
        trunk, plans = system.config.model.trunk, system.tasks
        width, self.plans, self.weights = trunk.width, plans, system.weights
        words, process = system.fields[text].codec.host, system.fields[image].process
        self.image_row = image
        sizes = {
            "vocab_size": system.fields[text].spec.vocab,
            "hidden_size": width,
            "intermediate_size": trunk.mlp_width,
            "num_hidden_layers": trunk.depth,
            "num_attention_heads": trunk.heads,
            "num_key_value_heads": trunk.kv_heads,
            "head_dim": trunk.get("head_dim") or width // trunk.heads,
            "rms_norm_eps": trunk.norm_epsilon,
            "rope_parameters": {"rope_type": "default", "rope_theta": trunk.rope_theta},
            "attention_bias": trunk.bias,
            "tie_word_embeddings": False,
            "attn_implementation": "sdpa",
            "bos_token_id": words.bos,
            "eos_token_id": None,
            "pad_token_id": words.pad,
        }
        kind, config = (Qwen3ForCausalLM, Qwen3Config) if trunk.qk_norm else (LlamaForCausalLM, LlamaConfig)
        self.lm = kind(config(**sizes))
        (self.patch,) = system.fields[image].codec.device
        self.features = self.patch.features
        self.embed = nn.Linear(self.features, width)
        self.time = nn.Sequential(nn.Linear(TIME_FEATURES, width), nn.SiLU(), nn.Linear(width, width))
        self.token = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        self.adaln, self.out = nn.Linear(width, 2 * width), nn.Linear(width, self.features)
        self.register_buffer("grid", torch.tensor(sincos_2d(*self.patch.grid, width)))
        frequency = torch.exp(-math.log(10_000.0) * torch.arange(TIME_FEATURES // 2) / (TIME_FEATURES // 2))
        self.register_buffer("frequency", frequency)
        for name, plan in plans.items():
            self.register_buffer(f"see_{name}", allowed(plan.layout))
        self.time_scale = float(process.schedule.time_input(1.0))

    # ------------------------------------------------------------------ parts

    def patches(self, images: torch.Tensor) -> torch.Tensor:
        """[B, h, w, C] -> [B, N, P], features (channel, row, column)."""
        p, (rows, columns) = self.patch, self.patch.grid
        x = images.reshape(-1, rows, p.size, columns, p.size, p.channels).permute(0, 1, 3, 5, 2, 4)
        return (x.reshape(-1, p.tokens, p.features) - p.shift) * p.scale

    def vector(self, t: torch.Tensor) -> torch.Tensor:
        """Time embedding `[B, 1, D]` of times `[B, 1]` in [0, 1]."""
        angles = (self.time_scale * t)[..., None] * self.frequency
        return self.time(torch.cat([angles.cos(), angles.sin()], dim=-1))

    def image(self, xt: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        """Time token and patches, `[B, 1 + N, D]`."""
        return torch.cat([self.token(vector), self.embed(xt) + self.grid], dim=1)

    def velocity(self, hidden: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
        """The image head: `[B, N, D]` -> `[B, N, P]`."""
        shift, scale = self.adaln(F.silu(vector)).chunk(2, dim=-1)
        hidden = F.layer_norm(hidden, hidden.shape[-1:], eps=1e-6)
        return self.out(hidden * (1 + scale) + shift)

    # ------------------------------------------------------------------ the joint step

    def noise(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Times `[B, 1]` (logit-normal) and noise `[B, N, P]` of one step, by "task/name"."""
        found = {}
        for task, plan in self.plans.items():
            for name in noised(plan):
                eps = torch.randn(plan.rows, self.patch.tokens, self.patch.features)
                found[f"{task}/{name}"] = torch.sigmoid(torch.randn(plan.rows, 1)), eps
        return found

    def forward(self, batch: Mapping[str, Any], noise: Mapping[str, Any], as_published: bool = False) -> torch.Tensor:
        """Weighted sum of the losses. noise: see the method of this name.

        as_published   as MonoFormer's code does it: all rows padded to the longest, the text head on all of their slots
        """
        rows, drawn = {}, {}
        for task, plan in self.plans.items():
            rows[task] = self.row(task, plan, batch[task], noise, drawn)
        if as_published:
            longest = max(x.shape[1] for x, _, _ in rows.values())
            rows = {task: padded(*row, longest) for task, row in rows.items()}
        hidden = self.trunk(rows)
        logits = self.logits(hidden) if as_published else {}
        total = torch.zeros(())
        for task, plan in self.plans.items():
            where = places(plan.layout)
            for label, (objective, _) in plan.objectives.items():
                if isinstance(objective, Diffusion):
                    (name,) = objective.names
                    vector, target = drawn[f"{task}/{name}"]
                    error = (self.velocity(hidden[task][:, where[name]], vector) - target) ** 2
                    loss = error[batch[task][name]["target"]].mean()
                else:
                    loss = self.nll(hidden[task], [batch[task][name] for name in objective.names], logits.get(task))
                total = total + self.weights[f"{task}/{label}"] * loss
        return total

    def row(self, task: str, plan: Any, batch: Any, noise: Any, drawn: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """Vectors `[B, S, D]`, flags of validity `[B, S]` and visibility `[B, S, S]` of a task's rows."""
        parts, valid = [], []
        for segment in plan.layout.segments:
            name = segment.name
            if row_of(name) != self.image_row:
                parts.append(self.lm.model.embed_tokens(batch[name]["ids"]))
                valid.append(batch[name]["valid"])
                continue
            x = self.patches(batch[name]["images"])
            t = x.new_zeros(x.shape[0], 1)
            if name in noised(plan):
                t, eps = noise[f"{task}/{name}"]
                x, target = (1 - t[..., None]) * x + t[..., None] * eps, eps - x
            vector = self.vector(t)
            if name in noised(plan):
                drawn[f"{task}/{name}"] = (vector, target)
            parts.append(self.image(x, vector))
            valid.append(torch.ones(x.shape[0], 1 + x.shape[1], dtype=torch.bool))
        flags = torch.cat(valid, dim=1)
        # A padded query is let see the valid keys: nobody reads it, and no row of the softmax is empty.
        return torch.cat(parts, dim=1), flags, getattr(self, f"see_{task}") & flags[:, None, :]

    def trunk(self, rows: Mapping[str, tuple[torch.Tensor, ...]]) -> dict[str, torch.Tensor]:
        """Hidden states of every task; tasks of one row length go through the trunk together, as ours do."""
        groups = defaultdict(list)
        for name, (x, _, _) in rows.items():
            groups[x.shape[1]].append(name)
        hidden = {}
        for names in groups.values():
            x, valid, see = (torch.cat(parts) for parts in zip(*(rows[n] for n in names), strict=True))
            out = self.through(x, valid, see)
            hidden |= dict(zip(names, out.split([rows[n][0].shape[0] for n in names]), strict=True))
        return hidden

    def through(self, x: torch.Tensor, valid: torch.Tensor, see: torch.Tensor, cache: Any = None, before: Any = 0):
        """The trunk on vectors `[B, Q, D]`; `see` `[B, Q, K]`, `before` the valid tokens that the cache holds."""
        positions = (valid.long().cumsum(1) - 1).clamp(min=0) + before
        mask = torch.zeros(see.shape).masked_fill(~see, HIDDEN)[:, None]
        given = {"inputs_embeds": x, "attention_mask": mask, "position_ids": positions}
        return self.lm.model(**given, past_key_values=cache, use_cache=cache is not None).last_hidden_state

    def logits(self, hidden: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The text head on all slots `[B, S, V]` of all tasks, whose rows have one length."""
        whole = self.lm.lm_head(torch.cat(list(hidden.values())))
        return dict(zip(hidden, whole.split([len(x) for x in hidden.values()]), strict=True))

    def nll(self, hidden: torch.Tensor, names: list[Any], made: torch.Tensor | None = None) -> torch.Tensor:
        """Mean cross-entropy of the targets, each predicted from the state before it; `made`: logits of all slots."""
        total, count = 0.0, 0
        for tokens in names:
            logits = self.lm.lm_head(hidden[:, tokens["before"]]) if made is None else made[:, tokens["before"]]
            total = total + F.cross_entropy(logits.flatten(0, 1), tokens["target"].flatten(), reduction="sum")
            count = count + (tokens["target"] != -100).sum()
        return total / count


def padded(
    x: torch.Tensor, valid: torch.Tensor, see: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A task's rows, as `Joint.row` gives them, with padding behind them up to a length."""
    more = length - x.shape[1]
    return F.pad(x, (0, 0, 0, more)), F.pad(valid, (0, more)), F.pad(see, (0, more, 0, more))


def noised(plan: Any) -> set[str]:
    """Names that a diffusion objective of a task adds noise to."""
    return {
        name
        for objective, _ in plan.objectives.values()
        if isinstance(objective, Diffusion)
        for name in objective.names
    }


@torch.no_grad()
def load(model: Joint, params: Mapping[str, np.ndarray], text: str, image: str) -> None:
    """Copies our parameters, by path; `text` and `image` are the names of the fields.

    Raises ValueError when one has no place or a place stays empty.
    """
    pairs = {
        f"fields/{text}/embed/table/embedding": model.lm.model.embed_tokens.weight,
        f"fields/{text}/head/linear/kernel": model.lm.lm_head.weight,
        "trunk/final_norm/scale": model.lm.model.norm.weight,
    }
    linears = {f"fields/{image}/embed/linear": model.embed, "time/first": model.time[0], "time/second": model.time[2],
               "conditioning/first": model.token[0], "conditioning/second": model.token[2],
               f"fields/{image}/head/adaln": model.adaln, f"fields/{image}/head/linear": model.out}  # fmt: skip
    for path, linear in linears.items():
        pairs |= {f"{path}/kernel": linear.weight, f"{path}/bias": linear.bias}
    inner = {"attention/q": "self_attn.q_proj", "attention/k": "self_attn.k_proj", "attention/v": "self_attn.v_proj",
             "attention/out": "self_attn.o_proj", "attention/q_norm": "self_attn.q_norm",
             "attention/k_norm": "self_attn.k_norm", "attention_norm": "input_layernorm",
             "mlp_norm": "post_attention_layernorm", "mlp/gate": "mlp.gate_proj", "mlp/up": "mlp.up_proj",
             "mlp/down": "mlp.down_proj"}  # fmt: skip
    filled = set()
    for path, array in params.items():
        array, turn = np.array(array), path.endswith("kernel")  # our kernels are [in, out], theirs [out, in]
        if path in pairs:
            places = [(pairs[path], array)]
        else:
            stem, _, kind = path.removeprefix("trunk/layers/").rpartition("/")
            if stem not in inner:
                raise ValueError(f"the peer has no place for the parameter {path}")
            name = f"{inner[stem]}.{'bias' if kind == 'bias' else 'weight'}"
            places = [(layer.get_parameter(name), array[i]) for i, layer in enumerate(model.lm.model.layers)]
        for target, value in places:
            target.copy_(torch.tensor(value.T if turn else value).reshape(target.shape))
            filled.add(id(target))
    empty = [name for name, value in model.named_parameters() if id(value) not in filled]
    if empty:
        raise ValueError(f"the peer's parameters {', '.join(empty)} have no counterpart in ours")
