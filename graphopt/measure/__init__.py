"""Honest timing: paired, interleaved, each contender in a process of its own; raw samples first."""

from graphopt.measure.comparison import Comparison, compare
from graphopt.measure.contenders import Contender
from graphopt.measure.counts import Counts
from graphopt.measure.environment import Environment, environment, fingerprint
from graphopt.measure.paired import PairedResult, race, race_afresh
from graphopt.measure.reference_kernels import time_reference
from graphopt.measure.saved import Leniency, compare_saved
from graphopt.measure.stats import LatencyStats, Ratio
from graphopt.measure.verdict import Judgement, Verdict

__all__ = [
    "Comparison",
    "Contender",
    "Counts",
    "Environment",
    "Judgement",
    "LatencyStats",
    "Leniency",
    "PairedResult",
    "Ratio",
    "Verdict",
    "compare",
    "compare_saved",
    "environment",
    "fingerprint",
    "race",
    "race_afresh",
    "time_reference",
]
