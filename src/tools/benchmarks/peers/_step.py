"""The trunk of the paper's config in plain PyTorch, with embedders and image head of the same sizes: a step's work.

Weights are random and nothing is compared; `peers/transformers.py` is the peer whose results are checked. Attention is
`scaled_dot_product_attention` with the mask of our rows, products run in bf16 (autocast) on float32 weights.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


class Shape(NamedTuple):
    """Sizes of the model and of a row: prompt, time token, image, tail."""

    width: int
    depth: int
    heads: int
    kv_heads: int
    mlp_width: int
    vocab: int
    features: int
    outputs: int
    prompt: int
    image: int
    tail: int

    @property
    def length(self) -> int:
        """Slots of a row."""
        return self.prompt + 1 + self.image + self.tail


class Layer(nn.Module):
    """A pre-norm block: grouped-query attention with rotary positions, SwiGLU."""

    def __init__(self, s: Shape):
        super().__init__()
        self.heads, self.kv_heads, self.head = s.heads, s.kv_heads, s.width // s.heads
        self.norm, self.mlp_norm = nn.RMSNorm(s.width), nn.RMSNorm(s.width)
        linear = lambda a, b: nn.Linear(a, b, bias=False)
        self.q, self.out = linear(s.width, s.width), linear(s.width, s.width)
        self.k, self.v = (linear(s.width, s.kv_heads * self.head) for _ in range(2))
        self.gate, self.up = linear(s.width, s.mlp_width), linear(s.width, s.mlp_width)
        self.down = linear(s.mlp_width, s.width)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """[B, S, D] -> [B, S, D]."""
        y = self.norm(x)
        split = lambda a, n: a.view(*a.shape[:2], n, self.head).transpose(1, 2)
        q, k = (rotated(split(a, n), cos, sin) for a, n in ((self.q(y), self.heads), (self.k(y), self.kv_heads)))
        v = split(self.v(y), self.kv_heads)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.heads != self.kv_heads)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary positions, halves against each other."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Denoiser(nn.Module):
    """Prompt and noised image through one trunk; `forward` is the mean squared error of what the head gives."""

    def __init__(self, s: Shape, again: bool):
        super().__init__()
        self.shape, self.again = s, again
        self.words, self.patches = nn.Embedding(s.vocab, s.width), nn.Linear(s.features, s.width)
        self.time = nn.Sequential(nn.Linear(256, s.width), nn.SiLU(), nn.Linear(s.width, s.width))
        self.layers = nn.ModuleList(Layer(s) for _ in range(s.depth))
        self.norm, self.logits = nn.RMSNorm(s.width), nn.Linear(s.width, s.vocab, bias=False)  # no gradient, as in ours
        self.adaln, self.head = nn.Linear(s.width, 2 * s.width), nn.Linear(s.width, s.outputs)
        half = s.width // s.heads // 2
        angles = torch.arange(s.length)[:, None] / 10_000.0 ** (torch.arange(half) / half)
        slots = torch.arange(s.length)
        inside = (slots > s.prompt) & (slots <= s.prompt + s.image)
        for name, value in (("cos", angles.cos()), ("sin", angles.sin())):
            self.register_buffer(name, value)
        self.register_buffer("mask", (slots <= slots[:, None]) | (inside & inside[:, None]))

    def forward(self, ids: torch.Tensor, image: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """ids [B, prompt + tail], image and noise [B, image, features], t [B, 1]."""
        s, t = self.shape, t[..., None]
        words = self.words(ids)
        vector = self.time((1000 * t * 10_000.0 ** (-torch.arange(256, device=t.device) / 256)).cos())
        noised = self.patches((1 - t) * image + t * noise)
        x = torch.cat([words[:, : s.prompt], vector, noised, words[:, s.prompt :]], dim=1)
        for layer in self.layers:
            args = (x, self.cos, self.sin, self.mask)
            x = checkpoint(layer, *args, use_reentrant=False) if self.again else layer(*args)
        x = self.norm(x)[:, s.prompt + 1 : s.prompt + 1 + s.image]
        shift, scale = self.adaln(F.silu(vector)).chunk(2, dim=-1)
        out = self.head(F.layer_norm(x, x.shape[-1:]) * (1 + scale) + shift)
        return (out[..., : s.features].float() - noise).square().mean() + 0.001 * out[
            ..., s.features :
        ].float().square().mean()


class Training:
    """A step: loss, gradients, clipping, AdamW, average.

    again      recompute the layers in the backward pass
    compiled   `torch.compile` of the model
    """

    def __init__(self, s: Shape, rows: int, device: str, again: bool, compiled: bool):
        torch.manual_seed(0)
        torch.set_float32_matmul_precision("high")
        torch._dynamo.reset()
        self.device = device
        with torch.device(device):
            model = Denoiser(s, again)
            self.batch = (
                torch.randint(s.vocab, (rows, s.prompt + s.tail)),
                *torch.randn(2, rows, s.image, s.features),
                torch.rand(rows, 1),
            )
        self.model = torch.compile(model) if compiled else model
        self.parameters = list(model.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, 1e-4, weight_decay=0.0, fused=True)

    def step(self) -> None:
        """One step, waited for."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.model(*self.batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 2.0, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1e-4)
        self.wait()

    def wait(self) -> None:
        """Until the device is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def figures(self) -> dict[str, Any]:
        """Parameters, and the peak of the device's memory."""
        found: dict[str, Any] = {"parameters": sum(p.numel() for p in self.parameters)}
        if self.device == "cuda":
            found["memory_device_peak"] = torch.cuda.max_memory_allocated()
        return found
