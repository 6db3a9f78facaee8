"""Figures of a report as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal


def size(count: float | None) -> str:
    """1234567 -> `1.23 MB`."""
    if count is None:
        return "-"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count:.0f} B"


def accuracy(record: Mapping[str, Any] | None) -> str:
    """`top-1 84.12 %`, `agreement 99.50 %` or `SNR 31.2 dB`."""
    if not record:
        return "-"
    value = record["value"]
    if record["metric"] == "snr":
        return "SNR ∞" if value is None else f"SNR {value:.1f} dB"
    return f"{'top-1' if record['metric'] == 'top1' else 'agreement'} {value:.2f} %"


def milliseconds(latency: Mapping[str, Any] | None) -> str:
    """Median and its 95 % interval."""
    if not latency:
        return "-"
    low, high = latency["interval_s"]
    return f"{1e3 * latency['median_s']:.3f} [{1e3 * low:.3f}, {1e3 * high:.3f}]"


def engine_name(engine: str) -> str:
    """As people write it."""
    return {"onnxruntime": "ONNX Runtime", "tvm": "TVM", "hybrid": "TVM and ONNX Runtime"}.get(engine, engine)


def part_times(part: Mapping[str, Any]) -> str:
    """Of a part alone in both engines, where it was timed: `0.061 / 0.078`."""
    seconds = part["seconds"]
    return f"{1e3 * seconds['tvm']:.3f} / {1e3 * seconds['onnxruntime']:.3f}" if len(seconds) == 2 else "-"


def instructions(count: int | None) -> str:
    """1234567 -> `1.235 M`."""
    if count is None:
        return "-"
    return f"{count / 1e9:.3f} G" if count >= 1e9 else f"{count / 1e6:.3f} M"


def share(ratio: list[float | None] | None) -> str:
    """Of the instructions of the baseline, from the ratio the other way round; exact, so without an interval."""
    return "-" if not ratio or not ratio[0] else f"{1 / ratio[0]:.3f}x"


def compared_by(report: Mapping[str, Any]) -> Literal["seconds", "instructions", "nothing"]:
    """What candidates were compared by."""
    return (report.get("place") or {}).get("unit") or "seconds"


def place(report: Mapping[str, Any]) -> str:
    """Where candidates ran."""
    return (report.get("place") or {}).get("label") or "this machine"


def baseline(report: Mapping[str, Any]) -> str:
    """The candidate that all others are compared with, as a heading says it."""
    return "input" if (report.get("place") or {}).get("kind", "here") == "here" else "exact"


def speedup(ratio: list[float | None] | None) -> str:
    """Median ratio and its 95 % interval."""
    if not ratio or ratio[0] is None:
        return "-"
    low, high = ("?" if end is None else f"{end:.2f}" for end in ratio[1:])  # too few rounds bound nothing
    return f"{ratio[0]:.2f}x [{low}, {high}]"
