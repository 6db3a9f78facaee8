"""The package in C: one static executable for one model, and the object file to link it into another program.

TVM's runtime comes as shared libraries only, so none of it is in there: the kernels are compiled again, with the
decisions of the artifact's library, and called by tables that are made here (`ahead_of_time.py`).
"""

from __future__ import annotations

import dataclasses
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from graphopt import capabilities, samples
from graphopt import model as models
from graphopt.errors import TargetError
from graphopt.packaging.c_compiler import compile_c
from graphopt.packaging.contents import FILES, PROCESSOR_HEADER, copy
from graphopt.packaging.plan_source import plan_source
from graphopt.packaging.source import Library, Source
from graphopt.plugins import parse_target
from graphopt.runtime.tvm_engine import TvmEngine, available_processors
from graphopt.targets.llvm import LlvmTarget

OBJECT, PROGRAM = "model.o", "run"


def fill(source: Source, stage: Path) -> dict[str, Any]:
    """Write the files; returns what package.json says of the executable.

    Raises TargetError: the artifact is ONNX Runtime's, there is no C compiler, the model needs TVM's virtual machine,
    or the executable does not compute what the artifact's library does (where this machine can run it).
    """
    if not source.libraries:
        raise TargetError(
            "ONNX Runtime was measured fastest for this model, and it makes no static executables",
            hint="give --runtime cpp or python, or optimize with --engine tvm",
        )
    library = source.libraries[0]
    with tempfile.TemporaryDirectory(prefix="graphopt-static-") as folder:
        work = Path(folder)
        _compile(source, library, work)
        checked = _checked(library, work)
        for name in (OBJECT, PROGRAM):
            copy(work / name, stage / name)
    (stage / PROGRAM).chmod(0o755)
    copy(FILES / "model.h", stage / "model.h")
    copy(FILES / "static_main.c", stage / "main.c")
    copy(FILES / "npy.h", stage / "npy.h")
    described = library.description
    row = {"file": PROGRAM, "target": library.target, "mcpu": described["mcpu"], "features": described["features"]}
    return {"libraries": [{**row, "tiles": described.get("tiles", False)}], "checked": checked}


def _compile(source: Source, library: Library, work: Path) -> None:
    described = library.description
    target = _target(library)
    model = models.fix_inputs(
        models.load(source.model), {each["name"]: tuple(each["shape"]) for each in described["inputs"]}
    )
    lowered = target.lower(model)
    lowered.decisions.update({name: tuple(chosen) for name, chosen in described.get("decisions", {}).items()})
    objects = work / "objects"
    objects.mkdir()
    plan = target.build_objects(lowered, objects)
    (work / "plan.c").write_text(plan_source(plan, described), encoding="utf-8")
    for name in ("model.h", "plan.h", "static_model.c", "static_main.c", "npy.h"):
        copy(FILES / name, work / name)
    copy(PROCESSOR_HEADER, work / PROCESSOR_HEADER.name)
    arch = str(described["arch"])
    for name in ("plan", "static_model"):
        compile_c(["-O2", "-c", f"{name}.c", "-o", f"objects/{name}.o"], arch, work)
    parts = sorted(str(each.relative_to(work)) for each in objects.iterdir())
    compile_c(["-r", "-nostdlib", "-o", OBJECT, *parts], arch, work)
    compile_c(["-O2", "-static", "-s", "static_main.c", OBJECT, "-o", PROGRAM, "-lpthread", "-lm"], arch, work)


def _target(library: Library) -> LlvmTarget:
    """The target that built the library, this machine's processor by its name."""
    target, described = parse_target(library.target), library.description
    if not isinstance(target, LlvmTarget):
        raise TargetError(f"{target} makes no static executables", hint="give --runtime cpp or python")
    known = {"threads": described["threads"], "precision": described["precision"]}
    if getattr(target, "mcpu", "") == "native" and described["mcpu"] in capabilities.X86_FEATURES:
        known["mcpu"] = described["mcpu"]
    return dataclasses.replace(target, **known)  # pyright: ignore[reportCallIssue, reportArgumentType, reportReturnType]


def _checked(library: Library, work: Path) -> str:
    """Run both on noise: they call the same kernels, so every bit is the same. Raises TargetError where one is not."""
    described = library.description
    if described["arch"] != capabilities.host_arch() or not set(described["features"]) <= capabilities.host_features():
        return f"not run: this machine is no {described['mcpu']}"
    signature = models.Signature(
        tuple(models.TensorSpec(i["name"], np.dtype(i["dtype"]), tuple(i["shape"])) for i in described["inputs"]), ()
    )
    feeds = samples.random_feeds(signature)
    wanted = TvmEngine(library.path.parent, 1).run(feeds)
    files = []
    for number, array in enumerate(feeds.values()):
        np.save(work / f"{number}.npy", array)
        files.append(f"{number}.npy")
    threads = str(min(available_processors(), 2))
    done = subprocess.run(
        [f"./{PROGRAM}", "-t", threads, *files], cwd=work, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise TargetError(f"the static executable failed: {done.stderr.strip()[:200] or done.returncode}")
    for name, array in wanted.items():
        found = np.load(work / f"{name.replace('/', '_')}.npy")
        if found.dtype != array.dtype or found.tobytes() != array.tobytes():
            raise TargetError(f"the static executable computes another {name!r} than the artifact's library")
    return "every bit as the artifact's library, on noise"
