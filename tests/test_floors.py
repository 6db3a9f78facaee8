"""The house has floors: a room imports only from its own floor or from below (docs/architecture.md)."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import graphopt

PACKAGE = Path(graphopt.__file__).parent

FLOORS = (
    {"errors", "spec", "capabilities", "arm_cores", "gpu_names", "progress", "guard", "arrays",
     "whole_files"},
    {"checking", "graph", "opsets", "shapes", "model", "external_data", "calibration", "measure"},
    {"passes.base", "targets.base"},
    {"passes", "targets", "runtime", "remote", "verify", "accuracy", "layer_noise", "samples", "inspection",
     "output_folder", "schedule_database"},
    {"plugins", "pipeline"},
    {"report", "settings", "diagnosis", "inspection_text"},
    set[str](),  # the stages of the driver: every room that is not named here
    {"driver", "ci"},
    {"console", "tuning_commands", "report_command", "targets_command", "farm_commands", "package_command",
     "compare_command", "ci_commands", "bisect_command", "pytest_plugin", "cli", "__main__"},
)  # fmt: skip
STAGES = 6
LAZY = ("tvm", "onnxscript", "onnxsim", "onnxruntime")


def room_of(module: str) -> str:
    parts = module.split(".")[1:]
    return ".".join(parts[:2]) if parts[:2] in (["passes", "base"], ["targets", "base"]) else parts[0]


def floor_of(room: str) -> int:
    return next((floor for floor, rooms in enumerate(FLOORS) if room in rooms), STAGES)


def modules() -> dict[str, ast.Module]:
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(("graphopt", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")
        if name != "graphopt":
            found[name] = ast.parse(file.read_text())
    return found


def imports(tree: ast.AST, only_module_level: bool = False) -> set[str]:
    """The modules a file imports, those for type checkers left out."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif not (only_module_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
            found |= imports(node, only_module_level)
    return found


def own_rooms(tree: ast.AST) -> set[str]:
    known = {room_of(name) for name in MODULES}
    return {room_of(name) for name in imports(tree) if name.startswith("graphopt.")} & known


MODULES = modules()


@pytest.mark.parametrize("name", sorted(MODULES))
def test_rooms_import_downward(name):
    room = room_of(name)
    upward = {other for other in own_rooms(MODULES[name]) if floor_of(other) > floor_of(room)}
    assert not upward, f"{name} (floor {floor_of(room)}) imports from above: {sorted(upward)}"


def test_passes_and_targets_never_import_each_other():
    for name, tree in MODULES.items():
        forbidden = {"passes": {"targets", "targets.base"}, "targets": {"passes", "passes.base"}}.get(
            room_of(name), set()
        )
        assert not own_rooms(tree) & forbidden, name


def test_only_the_relax_room_and_the_runtime_import_tvm():
    allowed = ("graphopt.targets", "graphopt.runtime", "graphopt.remote", "graphopt.diagnosis")
    users = {name for name, tree in MODULES.items() if any(i.split(".")[0] == "tvm" for i in imports(tree))}
    assert all(name.startswith(allowed) for name in users), sorted(users)


@pytest.mark.parametrize("name", sorted(n for n in MODULES if not n.startswith("graphopt.targets.")))
def test_heavy_packages_are_imported_inside_functions(name):
    heavy = {i.split(".")[0] for i in imports(MODULES[name], only_module_level=True)} & set(LAZY)
    assert not heavy, f"{name} imports {sorted(heavy)} at module level"


def test_import_graphopt_is_light():
    code = (
        "import sys, graphopt, graphopt.model, graphopt.graph, graphopt.passes.simplify, "
        f"graphopt.passes.fold_batch_norm, graphopt.inspection; print([m for m in {LAZY!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_the_walls_are_seen():
    """The checks above can fail: an import upward, a lazy import and one for type checkers are told apart."""
    tree = ast.parse(
        "from typing import TYPE_CHECKING\nimport tvm.relax\n"
        "if TYPE_CHECKING:\n    from graphopt import driver\n"
        "def f():\n    from graphopt import cli\n    import onnxsim\n"
    )
    assert own_rooms(tree) == {"cli"}
    assert {i.split(".")[0] for i in imports(tree, only_module_level=True)} & set(LAZY) == {"tvm"}
    assert floor_of("cli") > floor_of("driver") > floor_of("some_new_stage") > floor_of("pipeline") > floor_of("model")
