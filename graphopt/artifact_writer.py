"""Writing the artifact folder: model, compiled library, report, recipe, and last the manifest that makes it one."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graphopt import model as models
from graphopt.candidates import Candidate
from graphopt.libraries import Library
from graphopt.report import Report
from graphopt.report.front import front_plot, pareto
from graphopt.report.html import to_html
from graphopt.runtime.artifact import COMPILED, GENERAL, HYBRID, MODEL, write_manifest
from graphopt.settings import Settings
from graphopt.sizes.build import SizedLibrary
from graphopt.variants import Source
from graphopt.verify import Feeds

REPORT = "report.json"
REPORT_HTML = "report.html"
PARETO = "pareto.json"
PARETO_PICTURE = "pareto.svg"
RECIPE = "recipe.toml"
LATENCY = "latency.json"
INSTRUCTIONS = "instructions.json"


def write_artifact(
    folder: Path,
    chosen: Candidate,
    source: Source,
    sample: Feeds,
    settings: Settings,
    libraries: Sequence[Library],
    report: Report,
    measured: Mapping[str, Any] | None,
    sized: SizedLibrary | None = None,
) -> None:
    """Fill `folder` with the chosen candidate and the evidence; `measured` is what the choice rests on, None where
    nothing could be measured; `libraries` what a processor tries in turn; `sized` a library for several sizes, which
    takes the place of what was chosen for one."""
    by_sizes = sized is not None and sized.path is not None
    variant = sized.variant if sized is not None and by_sizes else chosen.variant
    models.save(variant.model if variant is not None else source.model, folder / MODEL)
    if sized is not None and sized.path is not None:
        shutil.copytree(sized.path, folder / COMPILED)
        libraries = ()
        if sized.by_input:
            models.save(source.model, folder / GENERAL)
    placed = []
    for index, library in enumerate(libraries):
        placed.append({"folder": f"{COMPILED}-{index}" if index else COMPILED, "target": library.record.target})
        shutil.copytree(library.path, folder / placed[-1]["folder"])
    if chosen.record.engine == "hybrid" and not by_sizes:
        shutil.copytree(chosen.path, folder / HYBRID)
    written = report.to_dict()
    (folder / REPORT).write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    (folder / REPORT_HTML).write_text(to_html(written), encoding="utf-8")
    front = pareto(written)
    if front is not None:
        (folder / PARETO).write_text(json.dumps(front, indent=1) + "\n", encoding="utf-8")
        (folder / PARETO_PICTURE).write_text(front_plot(front) + "\n", encoding="utf-8")
    unit = report.place.get("unit")
    if measured is not None:
        name = INSTRUCTIONS if unit == "instructions" else LATENCY
        (folder / name).write_text(json.dumps(measured) + "\n", encoding="utf-8")
    (folder / RECIPE).write_text(settings.to_toml(), encoding="utf-8")
    signature = models.signature(source.model)
    tuning = chosen.record.tuning or {}
    manifest = {
        "engine": "tvm" if by_sizes else chosen.record.engine,
        "sizes": by_sizes,
        "variant": "input" if variant is None else variant.record.name,
        "precision": chosen.record.precision,
        "target": settings.target,
        "libraries": [{"folder": COMPILED, "target": settings.target}] if by_sizes else placed,
        "parts": [
            {"engine": p.engine, "nodes": p.nodes, "why": p.why} for p in (() if by_sizes else chosen.record.parts)
        ],
        "measured": {"where": report.place.get("label"), "unit": unit, "timed": unit == "seconds"},
        "pipeline": variant.record.pipeline if variant is not None else "",
        "signature": {
            "inputs": [_tensor(s) for s in signature.inputs],
            "outputs": [_tensor(s) for s in signature.outputs],
        },
        "compiled_shapes": {name: list(array.shape) for name, array in sample.items()},
        "tuning_digest": tuning.get("digest"),
        "source_sha256": report.source.sha256 if report.source is not None else None,
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("graphopt", "apache-tvm", "apache-tvm-ffi", "onnxruntime", "onnx", "numpy")
        },
    }
    names = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())
    write_manifest(folder, manifest, [n for n in names if n.startswith((MODEL, GENERAL, COMPILED, f"{HYBRID}/"))])


def _tensor(spec: models.TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "dtype": str(spec.dtype), "shape": list(spec.shape)}
