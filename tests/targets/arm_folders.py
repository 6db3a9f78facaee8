"""Models compiled for ARM in a folder."""

from __future__ import annotations

from pathlib import Path

from graphopt.targets.arm import Arm


def build(model, target: Arm, folder: Path) -> Path:
    """Compile with the templates' first decisions; returns the folder."""
    folder.mkdir(exist_ok=True)
    lowered = target.lower(model)
    target.tune(lowered, seconds=0, database=folder / "schedules.jsonl")
    target.build(lowered, folder)
    return folder
