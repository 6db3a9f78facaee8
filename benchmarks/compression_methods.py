"""The methods that `compression` compares: each a ladder of settings."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from compiled_race import Maker, Version, points

FP32, INT8 = "fp32", "INT8"
INT8_PASSES = "quantize-int8"


@dataclass(frozen=True)
class Method:
    """`ladder`: what a setting is called, and its passes behind the exact ones."""

    name: str
    ladder: tuple[tuple[str, str], ...]
    climbs: bool = True
    """The mildest setting comes first, and the last one that holds is taken; else the first one that holds."""


def _low_rank(energy: float) -> tuple[str, str]:
    return f"{energy:g} of the energy", f"low-rank-split{{energy={energy:g}}},refit-layers"


def _pruning(ratio: float) -> tuple[str, str]:
    return f"{ratio:g} of the MACs cut", f"prune-channels{{ratio={ratio:g}}},refit-layers"


METHODS = {
    "low-rank": Method("low-rank alone", tuple(_low_rank(e) for e in (0.999, 0.995, 0.99, 0.98, 0.96, 0.94))),
    "pruning": Method("pruning alone", tuple(_pruning(r) for r in (0.03, 0.05, 0.1, 0.15, 0.2, 0.3))),
    "INT4": Method(
        "INT4 weights",
        (("all layers", "quantize-int4"), ("mixed with 8 bits", "quantize-int4{bits=mixed}")),
        climbs=False,
    ),
}


def within(maker: Maker, method: Method, max_drop: float, whole: bool) -> dict[str, Version] | str:
    """The strongest setting within the bound and what it made, or why there is none; progress goes to stderr.

    `whole`: no setting is left out because a milder one failed, and all that are within the bound are given.
    """
    kept: dict[str, Version] = {}
    failed: list[str] = []
    for setting, passes in method.ladder:
        version = maker.make(passes)
        what = f"loses {points(version.lost)} points" if version.changed else "changes nothing"
        share = f"{version.macs / maker.exact.macs:.3f} of the MACs"
        print(f"{maker.which.name}, {method.name}, {setting}: {share}, {what}", file=sys.stderr, flush=True)
        if not version.changed:
            continue
        if version.lost <= max_drop:
            kept = {**(kept if whole else {}), setting: version}
        else:
            failed.append(f"{setting} {what}")
        if not whole and (version.lost > max_drop) == method.climbs:
            break
    return kept or f"none within {max_drop:g}: {'; '.join(failed) or 'no setting changes anything'}"
