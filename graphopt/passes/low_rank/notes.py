"""What a split of many layers says about itself."""

from __future__ import annotations

from collections import Counter

from graphopt.graph import label
from graphopt.passes.low_rank.choose import Split
from graphopt.passes.low_rank.inputs import has_covariance
from graphopt.passes.low_rank.problem import Problem


def notes_on(done: list[tuple[Problem, Split]], outputs: bool) -> tuple[str, ...]:
    """`outputs`: whether these, not the weights, were fitted."""
    if not done:
        return ()
    methods = Counter(split.method for _, split in done)
    listed = ", ".join(f"{count} by {method}" for method, count in sorted(methods.items()))
    kept = 1 - max(split.lost for _, split in done)
    what = "outputs" if outputs else "weights"
    notes = [f"{len(done)} layers split ({listed}); each keeps {100 * kept:.2f} % or more of the energy of its {what}"]
    plain = [label(p.layer.node) for p, _ in done if outputs and not has_covariance(p)]
    if plain:
        notes.append(f"too large for a covariance, fitted to weights: {', '.join(plain)}")
    return tuple(notes)
