"""Published peaks of accelerators: bf16 operations a second of one device of JAX."""

from __future__ import annotations

import re

# By the name that JAX gives a device, a regular expression. TPU: docs.cloud.google.com/tpu/docs/<generation>, per chip;
# a chip of TPU7x is two devices. NVIDIA: the products' data sheets, dense (half of the figure with sparsity).
BF16 = {
    r"TPU v4": 275e12,
    r"TPU v5e|TPU v5 lite": 197e12,
    r"TPU v5p|TPU v5": 459e12,
    r"TPU v6e|TPU v6 lite": 918e12,
    r"TPU7x": 2307e12 / 2,
    r"NVIDIA A100-(SXM4|PCIE)-[48]0GB|NVIDIA A100 80GB PCIe": 312e12,
    r"NVIDIA H100 PCIe": 756e12,
    r"NVIDIA H100 80GB HBM3": 989e12,
    r"NVIDIA H200": 989e12,
}


def bf16_peak(kind: str) -> float | None:
    """Operations a second of a device of this kind (`jax.Device.device_kind`); None where no figure is known."""
    return next((flops for pattern, flops in BF16.items() if re.fullmatch(pattern, kind)), None)
