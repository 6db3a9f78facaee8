"""`graphopt doctor`: what this machine and each target can do here."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform

from graphopt import plugins
from graphopt.schedule_database import cache_folder
from graphopt.targets.base import Diagnosis

PACKAGES = ("onnx", "onnx-ir", "onnxruntime", "onnxsim", "onnxscript", "numpy")


def diagnose() -> list[Diagnosis]:
    """Rows for the machine, the packages, the schedule database, and what each target says of itself."""
    rows = [
        Diagnosis("machine", True, f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    ]
    for name in PACKAGES:
        try:
            rows.append(Diagnosis(name, True, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append(Diagnosis(name, False, "not installed", f"pip install {name}"))
    rows.append(_database())
    for name in plugins.target_names():
        module = importlib.import_module(plugins.target_class(name).__module__)
        if hasattr(module, "doctor"):
            rows.extend(module.doctor())
    return rows


def _database() -> Diagnosis:
    folder = cache_folder()
    existing = folder
    while not existing.exists():
        existing = existing.parent
    writable = os.access(existing, os.W_OK)
    return Diagnosis("schedule database", writable, str(folder), "set GRAPHOPT_CACHE to a folder you can write")
