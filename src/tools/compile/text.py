"""Reports of `src/tools/aot.py` for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from src.tools.compile import programs
from src.tools.compile.chips import GIB


def describe(report: Mapping[str, Any], title: str) -> str:
    """All of one report, a line for each fact."""
    chip = report["chip"]
    mesh = ", ".join(f"{name}={size}" for name, size in report["mesh"].items())
    where = f"{report['topology']}" + (f" x {report['slices']} slices" if report["slices"] > 1 else "")
    lines = [
        f"{title} on {where}: {report['chips']} {chip['name']} chips, mesh {mesh}",
        f"  chip (published): {chip['flops'] / 1e12:.0f} TFLOP/s bf16, {chip['hbm'] / GIB:.0f} GiB at"
        f" {chip['hbm_rate'] / 1e9:.0f} GB/s, {chip['link'] / 1e9:.0f} GB/s a link ({chip['source']})",
        f"  parameters {report['parameters']:,}; compiled in {report['compile_seconds']:.0f} s",
        *_memory(report["memory"]),
    ]
    if "roofline" in report:
        lines += [*_work(report), *_times(report)]
    if "encoding" in report:
        lines += _encoding(report["encoding"])
    if "predicted" in report:
        lines += _predicted(report)
    if "assumptions" in report:
        lines += ["  assumptions", *(f"    {line}" for line in report["assumptions"])]
    return "\n".join(lines)


def table(tried: Sequence[Mapping[str, Any]]) -> str:
    """The table of a search."""
    lines = [f"{'fits':5}{'GiB':>7}{'best ms':>9}{'worst ms':>10}{'MFU':>12}  change"]
    for r in tried:
        best, worst = programs.seconds(r, "best"), programs.seconds(r, "worst")
        row = f"{'yes' if programs.fits(r) else 'no':5}{programs.peak(r) / GIB:7.2f}"
        if best is not None and worst is not None:
            mfu = "-".join(f"{100 * r['predicted'][case]['mfu']:.0f}" for case in ("worst", "best"))
            row += f"{1e3 * best:9.1f}{1e3 * worst:10.1f}{mfu + ' %':>12}"
        else:
            row += f"{'-':>9}{'-':>10}{'-':>12}"
        lines.append(f"{row}  {r['change']}")
    return "\n".join(lines)


def _encoding(report: Mapping[str, Any]) -> list[str]:
    """The frozen encoders' program."""
    lines = ["  frozen encoders, in a program of their own before the step"]
    lines += [f"    {line}" for line in report["assumed"]]
    lines.append(f"    compiled in {report['compile_seconds']:.0f} s")
    lines += _memory(report["memory"], "memory of one device meanwhile")
    return lines + ([*_work(report), *_times(report)] if "roofline" in report else [])


def _memory(memory: Mapping[str, Any], title: str = "memory of one device") -> list[str]:
    whole = ("total", "hbm", "fits", "shortfall")
    lines = [f"  {title}"]
    lines += [f"    {name:<28}{size / GIB:8.3f} GiB" for name, size in memory.items() if name not in whole]
    verdict = "fits" if memory["fits"] else f"DOES NOT FIT, {memory['shortfall'] / GIB:.2f} GiB too much"
    have = f"of {memory['hbm'] / GIB:.2f} GiB: {verdict}"
    return [*lines, f"    {'total':<28}{memory['total'] / GIB:8.3f} GiB {have}"]


def _work(report: Mapping[str, Any]) -> list[str]:
    flops, lines = report["flops"], ["  work of one execution"]
    if "model_per_step" in flops:
        lines.append(f"    model FLOPs, all devices    {flops['model_per_step']:.3e}")
    each = "" if flops["passes_per_device"] == flops["program_per_device"] else ", in float32 at the highest precision"
    lines.append(f"    matrix products, one device {flops['program_per_device']:.3e}{each}")
    lines.append(f"    memory traffic, one device  {report['hbm_bytes'] / 1e9:.2f} GB")
    for c in report["collectives"]:
        name = f"{c['kind']} over {' x '.join(c['axes'])}"
        lines.append(f"    {name:<40}{c['bytes'] / 1e6:12.2f} MB received in {c['executions']} executions")
    return lines


def _times(report: Mapping[str, Any]) -> list[str]:
    times = report["roofline"]
    parts = ", ".join(f"{name} {1e3 * times[name]:.2f} ms" for name in ("compute", "hbm", "network"))
    return [f"  roofline: {parts}; best case {1e3 * times['best']:.2f} ms, worst case {1e3 * times['worst']:.2f} ms"]


def _predicted(report: Mapping[str, Any]) -> list[str]:
    lines = []
    best, worst = report["predicted"]["best"], report["predicted"]["worst"]
    for name in best:
        low, high = sorted((worst[name], best[name]))
        if name == "mfu":
            low, high, label = 100 * low, 100 * high, "MFU, %"
        else:
            label = name.replace("_", " ")
        if name == "days":
            label = f"days to {report['steps']:,} steps"
        lines.append(f"    {label:<28}{_number(low)} to {_number(high)}")
    return ["  predicted, worst to best case", *lines]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
