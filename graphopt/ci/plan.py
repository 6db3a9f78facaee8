"""`graphopt.toml`: which models are gated, for which targets, within which bounds.

    [ci]
    base = "base"                     # artifacts of the base branch: base/NAME, or base/NAME@TARGET of several
    output = "out"                    # where those of this commit are built
    report = "graphopt-report"        # report.json, report.md, junit.xml
    history = "latency.jsonl"         # a line a case and commit; left out: none is kept
    threads = 1
    seconds = 60                      # of a comparison, at most

    [ci.bounds]                       # of all models
    max-regression = "5%"

    [models.digits]
    model = "digits.onnx"             # optimized for each target; or `new`: an artifact or ONNX file that is there
    targets = ["cpu{mcpu=cascadelake}", "arm{mcpu=cortex-a72}"]
    data = "eval.npz"                 # measures accuracy, for max-drop
    optimize = {preset = "int8", calib = "calib.npz"}        # options of `graphopt optimize`
    bounds = {max-instructions = "2%", max-size = "+10kB", max-drop = 0.5}

Targets with bounds of their own are tables: `[models.digits.targets."arm{mcpu=cortex-a72}"]` with `max-kernels = "+0"`.
Paths are relative to the file.
"""

from __future__ import annotations

import re
import sys
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graphopt.ci.figures import Bounds, parse_bounds
from graphopt.errors import SpecError, nearest
from graphopt.settings import Settings, check_option

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

FILE = "graphopt.toml"
DEFAULT_TARGET = "cpu"
_SECTION = {
    "base": str, "output": str, "report": str, "history": str, "threads": int, "seconds": float, "seed": int,
    "bounds": dict,
}  # fmt: skip
_MODEL = {
    "model": str, "new": str, "base": str, "targets": object, "data": str, "preprocess": str, "optimize": dict,
    "bounds": dict,
}  # fmt: skip
_OWN = ("model", "output", "target", "overwrite")
"""Settings that the plan decides itself."""
_PATHS = ("calib", "eval", "preprocess")


@dataclass(frozen=True)
class Case:
    """One model for one target. `new` is built from `model` with `settings` unless it is given."""

    name: str
    """`digits`, or `digits@arm-mcpu-cortex-a72` where a model has several targets."""
    model: Path | None
    target: str
    base: Path
    new: Path
    settings: Mapping[str, Any]
    """Options of `optimize`, but for those the plan decides."""
    bounds: Bounds
    data: Path | None = None
    preprocess: str | None = None


@dataclass(frozen=True)
class Plan:
    """All of a `graphopt.toml`."""

    cases: tuple[Case, ...]
    report: Path
    history: Path | None = None
    threads: int = 1
    seconds: float = 60.0
    seed: int = 0
    trust: bool = False
    """Load compiled libraries that were not built here, as a base from another machine is. Never read from the file."""


def read_plan(path: Path, only: tuple[str, ...] = ()) -> Plan:
    """Read a plan; `only` names the models to keep. Raises SpecError: unreadable, unknown keys, nothing to do."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SpecError(f"no such file: {path}", hint="docs/ci.md shows one") from None
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{path} is not valid TOML: {error}") from error
    _known(content, {"ci": dict, "models": dict}, str(path))
    section = _known(content.get("ci", {}), _SECTION, f"{path}: [ci]")
    models = content.get("models", {})
    for name in only:
        if name not in models:
            near = nearest(name, models)
            raise SpecError(f"{path} has no model {name!r}", hint=f"did you mean {near!r}?" if near else None)
    root = path.absolute().parent
    cases = [
        case
        for name, model in models.items()
        if not only or name in only
        for case in _cases(name, _known(model, _MODEL, f"{path}: [models.{name}]"), section, root, path)
    ]
    if not cases:
        raise SpecError(f"{path} names no model", hint="add a table [models.NAME] with model = FILE")
    threads, seconds = section.get("threads", 1), float(section.get("seconds", 60.0))
    if threads < 1 or seconds <= 0:
        raise SpecError(f"{path}: [ci] threads and seconds must be positive")
    return Plan(
        tuple(cases),
        root / section.get("report", "graphopt-report"),
        root / section["history"] if "history" in section else None,
        threads,
        seconds,
        section.get("seed", 0),
    )


def _cases(name: str, model: Mapping[str, Any], section: Mapping[str, Any], root: Path, path: Path) -> list[Case]:
    where = f"{path}: [models.{name}]"
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        raise SpecError(f"{where}: a name is letters, digits, - and _, since folders are named by it")
    if ("model" in model) == ("new" in model):
        raise SpecError(f"{where} needs either `model`, to optimize, or `new`, to judge as it is")
    if "new" in model and ("targets" in model or "optimize" in model):
        raise SpecError(f"{where}: `new` is judged as it is: it takes no targets and no options of optimize")
    targets = model.get("targets", [DEFAULT_TARGET])
    if isinstance(targets, list) and targets and all(isinstance(t, str) for t in targets):
        targets = {target: {} for target in targets}
    if not isinstance(targets, dict) or not targets or not all(isinstance(b, dict) for b in targets.values()):
        raise SpecError(f"{where}: targets is a list of targets, or a table of target = bounds")
    if "base" in model and len(targets) > 1:
        raise SpecError(f"{where}: one `base` cannot serve several targets", hint="leave it out: [ci] base has them")
    settings = _settings(model.get("optimize", {}), section, root, where)
    found = []
    for target, own in targets.items():
        full = f"{name}@{slug(target)}" if len(targets) > 1 else name
        bounds = parse_bounds({**section.get("bounds", {}), **model.get("bounds", {}), **own}, where)
        if bounds.max_drop is not None and "data" not in model:
            raise SpecError(f"{where}: max-drop needs `data`")
        found.append(
            Case(
                full,
                root / model["model"] if "model" in model else None,
                target,
                root / model.get("base", f"{section.get('base', 'base')}/{full}"),
                root / model.get("new", f"{section.get('output', 'out')}/{full}"),
                settings,
                bounds,
                root / model["data"] if "data" in model else None,
                _preprocess(model.get("preprocess"), root),
            )
        )
    if len({case.name for case in found}) < len(found):
        raise SpecError(f"{where}: two targets would share a folder")
    return found


def _settings(options: Mapping[str, Any], section: Mapping[str, Any], root: Path, where: str) -> dict[str, Any]:
    """Options of `optimize` with paths made absolute; the threads and the seed of [ci] unless it has its own."""
    hints = typing.get_type_hints(Settings)
    found: dict[str, Any] = {"threads": section.get("threads", 1), "seed": section.get("seed", 0)}
    for key, value in options.items():
        name = key.replace("-", "_")
        if name in _OWN:
            raise SpecError(f"{where}: {key} of optimize is decided by the plan")
        if name not in hints:
            near = nearest(name, hints)
            raise SpecError(f"{where}: optimize has no {key!r}", hint=f"did you mean {near!r}?" if near else None)
        found[name] = check_option(f"{where}: {key}", value, hints[name])
    for name in _PATHS:
        if found.get(name) not in (None, "random") and name != "preprocess":
            found[name] = str(root / found[name])
    found["preprocess"] = _preprocess(found.get("preprocess"), root)
    return {k: v for k, v in found.items() if v is not None}


def _preprocess(text: str | None, root: Path) -> str | None:
    """A preset's name, or a file beside the plan."""
    return str(root / text) if text is not None and text.endswith(".toml") else text


def slug(target: str) -> str:
    """`arm{mcpu=cortex-a72}` -> `arm-mcpu-cortex-a72`."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", target).strip("-")


def _known(table: Any, kinds: Mapping[str, type], where: str) -> dict[str, Any]:
    if not isinstance(table, dict):
        raise SpecError(f"{where} must be a table")
    for key, value in table.items():
        if key not in kinds:
            near = nearest(key, kinds)
            hint = f"did you mean {near!r}?" if near else f"known: {', '.join(kinds)}"
            raise SpecError(f"{where}: unknown key {key!r}", hint=hint)
        kind = kinds[key]
        fits = isinstance(value, (int, float) if kind is float else kind) and (kind is object or value is not True)
        if not fits:
            raise SpecError(f"{where}: {key} must be {_CALLED.get(kind, kind.__name__)}, not {value!r}")
    return table


_CALLED: dict[type, str] = {str: "text", int: "a whole number", float: "a number", dict: "a table"}
