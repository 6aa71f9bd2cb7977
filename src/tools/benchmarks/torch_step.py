"""A PyTorch model of the paper's shape on the same device: its step, for what an accelerator does in ours."""

from __future__ import annotations

import gc
import importlib.util
from typing import Any

from src.build import build_system
from src.common.mesh.peaks import bf16_peak
from src.interfaces import row_of
from src.tools.benchmarks import clock
from src.train.flops import step_flops

TRIES = (  # rows, layers again in the backward pass, torch.compile
    (32, False, False),
    (32, False, True),
    (128, False, True),
    (128, True, True),
)
TINY_TRIES = ((4, False, False), (4, False, True))


def measure_torch(sizes: Any) -> Any:
    """Seconds of its step by rows and kind; one line that says why where there is no PyTorch for this device."""
    from src.tools.benchmarks.accelerator_parts import about, paper_config

    if importlib.util.find_spec("torch") is None:
        yield "all", lambda: {"skipped": "PyTorch is not installed (requirements-peers.txt)"}
        return
    import torch

    on_gpu = torch.cuda.is_available()
    if not (on_gpu or sizes.tiny):
        yield "all", lambda: {"skipped": f"this build of PyTorch ({torch.__version__}) has no support for this device"}
        return
    device = "cuda" if on_gpu else "cpu"
    peak = bf16_peak(torch.cuda.get_device_name()) if on_gpu else None
    config, changed = paper_config(
        sizes, torch.cuda.get_device_properties(0).total_memory if on_gpu else about()["memory"]
    )

    def one(rows: int, again: bool, compiled: bool) -> dict[str, Any]:
        from src.tools.benchmarks.peers._step import Training

        config.batch = rows
        system = build_system(config)
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        training = Training(shape_of(system), rows, device, again, compiled)
        for _ in range(2):
            training.step()
        taken = clock.spread(clock.repeat(training.step, sizes.seconds, sizes.calls))
        needed, tokens = step_flops(system)["total"], rows * shape_of(system).length
        speed = {"tokens_per_second": tokens / taken["median"], "model_flops_per_second": needed / taken["median"]}
        if peak:
            speed["mfu"] = needed / taken["median"] / peak
        return {"rows": rows, "torch": torch.__version__, "seconds": taken, **speed, **training.figures(),
                **({"changed": changed} if changed else {})}  # fmt: skip

    for rows, again, compiled in TINY_TRIES if sizes.tiny else TRIES:
        kind = ("compiled" if compiled else "eager") + (", layers recomputed" if again else "")
        yield f"{rows} rows, {kind}", lambda r=rows, a=again, c=compiled: one(r, a, c)


def shape_of(system: Any) -> Any:
    """The sizes of a system whose only task has rows of prompt, time token, image and tail."""
    from src.tools.benchmarks.peers._step import Shape

    trunk, (plan,) = system.config.model.trunk, system.tasks.values()
    lengths = {segment.name: segment.length for segment in plan.layout.segments}
    (image,) = (name for name in lengths if system.fields[row_of(name)].process is not None)
    before = sum(lengths[s.name] for s in plan.layout.segments[: list(lengths).index(image)])
    field = system.fields[image]
    sizes = (trunk.width, trunk.depth, trunk.heads, trunk.kv_heads, trunk.mlp_width)
    vocab = next(f.spec.vocab for f in system.fields.values() if f.spec.vocab is not None)
    tail = sum(lengths.values()) - before - lengths[image]
    return Shape(*sizes, vocab, field.spec.features, field.process.outputs, before, lengths[image], tail)
