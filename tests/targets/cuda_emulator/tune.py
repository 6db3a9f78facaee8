"""Tune and build a model on the emulated driver: tune.py MODEL.onnx FOLDER DATABASE SPEC SECONDS; writes the report."""

import json
import sys
from pathlib import Path

from graphopt import model as models
from graphopt.plugins import parse_target
from graphopt.targets import nvcc
from tests.targets import cuda_emulator

if __name__ == "__main__":
    model, folder, database, spec, seconds = sys.argv[1:]
    nvcc.compile_source = cuda_emulator.compile_source
    target = parse_target(spec)
    lowered = target.lower(models.load(Path(model)))
    report = target.tune(lowered, seconds=float(seconds), database=Path(database))
    target.build(lowered, Path(folder))
    said = {"trials": report.trials, "known": report.from_database, "rows": [dict(row) for row in report.rows]}
    sys.stdout.write(json.dumps(said) + "\n")
