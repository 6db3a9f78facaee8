"""From an artifact to a folder that runs where graphopt is not installed: model, runtime, interface and example.

`package` writes it; every package has a `package.json`, which its loader reads and which says what each file is and how
many bytes it has.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt.errors import SpecError, nearest
from graphopt.output_folder import staged
from graphopt.packaging import c_static, cpp, python
from graphopt.packaging.readme import readme
from graphopt.packaging.source import read_source
from graphopt.runtime.artifact import require_trust, sha256

RUNTIMES = {"cpp": cpp.fill, "python": python.fill, "c-static": c_static.fill}
DESCRIPTION = "package.json"
FORMAT = 1


@dataclass(frozen=True)
class Package:
    """What was written: `description` is the content of package.json."""

    path: Path
    description: dict[str, Any]


def package(
    artifact: str | os.PathLike[str],
    output: str | os.PathLike[str],
    runtime: str,
    overwrite: bool = False,
    trust: bool = False,
) -> Package:
    """Write the folder `output`, whole or not at all.

    `trust`: as in `graphopt.load`; only c-static, which is checked against the artifact's library, runs it.

    Raises SpecError: no such runtime; ArtifactError: the artifact cannot be read, or `output` cannot be written;
    TargetError: TVM's runtime cannot be fetched, a compiler is missing, or the model does not go with this runtime.
    """
    if runtime not in RUNTIMES:
        near = nearest(runtime, RUNTIMES)
        hint = f"did you mean {near!r}?" if near else f"known: {', '.join(RUNTIMES)}"
        raise SpecError(f"unknown runtime {runtime!r}", hint=hint)
    source = read_source(artifact)
    if runtime == "c-static":
        require_trust(artifact, trust)
    with staged(output, overwrite, marker=DESCRIPTION) as stage:
        described = {
            "format": FORMAT,
            "runtime": runtime,
            "engine": source.manifest["engine"],
            "arch": source.arch,
            "target": source.manifest.get("target"),
            "variant": source.manifest.get("variant"),
            "precision": source.manifest.get("precision"),
            "inputs": source.inputs,
            "outputs": source.outputs,
            **RUNTIMES[runtime](source, stage),
            "versions": _versions(),
        }
        if source.arch is None:
            described["model"] = {"file": "model.onnx", "sha256": sha256(stage / "model.onnx")}
        (stage / "README.md").write_text(readme(described), encoding="utf-8")
        files = sorted(each for each in stage.rglob("*") if each.is_file())
        described["files"] = {str(each.relative_to(stage)): each.stat().st_size for each in files}
        described["total_bytes"] = sum(described["files"].values())
        (stage / DESCRIPTION).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    return Package(Path(output), described)


def _versions() -> dict[str, str]:
    names = ("graphopt", "apache-tvm", "apache-tvm-ffi", "onnxruntime")
    return {name: importlib.metadata.version(name) for name in names}
