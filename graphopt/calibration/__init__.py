"""Calibration data in, tensor statistics out."""

from graphopt.calibration.dataset import Dataset, load_dataset, random_dataset
from graphopt.calibration.observe import collect_statistics
from graphopt.calibration.statistics import TensorStatistics, merge

__all__ = [
    "Dataset",
    "TensorStatistics",
    "collect_statistics",
    "load_dataset",
    "merge",
    "random_dataset",
]
