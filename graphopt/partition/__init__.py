"""Cutting a model into parts for two engines."""

from __future__ import annotations

from graphopt.partition.cutting import Part, cut, work_of
from graphopt.partition.nodes import Nodes
from graphopt.partition.part_models import PartModel, extract
from graphopt.partition.phases import fewest_parts
from graphopt.partition.segments import segments
from graphopt.partition.types import inlined, known_types, record_types, store_constants

__all__ = [
    "Nodes",
    "Part",
    "PartModel",
    "cut",
    "extract",
    "fewest_parts",
    "inlined",
    "known_types",
    "record_types",
    "segments",
    "store_constants",
    "work_of",
]
