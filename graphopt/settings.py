"""Every setting of an optimize run: one value that is echoed, written to recipe.toml, and read back from it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from graphopt.errors import SpecError, nearest
from graphopt.pipeline import PRESETS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

Engine = Literal["auto", "tvm", "onnxruntime"]
Precision = Literal["float32", "bf16", "fp16"]
Objective = Literal["latency", "size"]
Metric = Literal["auto", "snr"]


@dataclass(frozen=True)
class Settings:
    """What the user asked for. Paths are absolute once resolved; `passes` is empty when `preset` decides."""

    model: str
    output: str | None = None
    target: str = "cpu"
    remote: str | None = None
    """An RPC server, `HOST:PORT/KEY`, or a tracker's devices, `tracker:HOST:PORT/KEY`: candidates are tuned, verified
    and timed there."""
    preset: str = "exact"
    passes: str | None = None
    calib: str | None = None
    """Path of calibration data, or `random`."""
    calib_samples: int | None = None
    """Draw this many from `calib` (seeded); what is not drawn is held out for `eval`."""
    eval: str | None = None
    preprocess: str | None = None
    """Named preset or TOML file for image folders."""
    max_drop: float = 1.0
    """Allowed loss, in points of top-1, or of agreement with the input model where there are no labels."""
    min_snr: float = 20.0
    """dB; the bound for lossy passes where a model's output is not a class."""
    metric: Metric = "auto"
    """What is bounded: classes where the output looks like some, (N, classes), else signal-to-noise; `snr`: that in any
    case, as for embeddings."""
    inputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Static shapes by input name."""
    sizes: tuple[str, ...] = ()
    """A compiled function for each size, or range of sizes, of dynamic dimensions (`graphopt.sizes.grammar`)."""
    threads: int | None = None
    engine: Engine = "auto"
    precision: Precision = "float32"
    """`bf16` or `fp16` adds compiled candidates with images and weights in 16 bits, judged as lossy (see
    `graphopt.precision`)."""
    objective: Objective | None = None
    """Search for the settings of all layers that make the fastest model within the bound, or the smallest, from the
    pipeline on; None: no search, unless the preset is `auto`, which searches for the fastest."""
    search_seconds: float = 900.0
    """About how long that search may take."""
    tune_seconds: float = 60.0
    measure_seconds: float = 15.0
    seed: int = 0
    overwrite: bool = False

    def pipeline_text(self) -> str:
        """The pipeline as text: `passes`, else the preset's. Raises SpecError for an unknown preset."""
        if self.passes is not None:
            return self.passes
        if self.preset not in PRESETS:
            near = nearest(self.preset, PRESETS)
            hint = f"did you mean {near!r}?" if near else f"known: {', '.join(PRESETS)}"
            raise SpecError(f"unknown preset {self.preset!r}", hint=hint)
        return PRESETS[self.preset]

    def resolved(self) -> Settings:
        """The same with absolute paths, the preset spelt out and numbers checked. Raises SpecError."""
        if self.max_drop < 0:
            raise SpecError(f"--max-drop {self.max_drop:g} must not be negative")
        for name in ("tune_seconds", "measure_seconds", "search_seconds"):
            if getattr(self, name) < 0:
                raise SpecError(f"--{name.replace('_', '-')} {getattr(self, name):g} must not be negative")
        for name in ("threads", "calib_samples"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise SpecError(f"--{name.replace('_', '-')} {number} must be at least 1")
        if self.metric not in typing.get_args(Metric):
            raise SpecError(f"unknown metric {self.metric!r}", hint=f"known: {', '.join(typing.get_args(Metric))}")
        if self.engine not in typing.get_args(Engine):
            raise SpecError(f"unknown engine {self.engine!r}", hint=f"known: {', '.join(typing.get_args(Engine))}")
        if self.precision not in typing.get_args(Precision):
            known = ", ".join(typing.get_args(Precision))
            raise SpecError(f"unknown precision {self.precision!r}", hint=f"known: {known}")

        objective = self.objective
        if self.preset == "auto" and self.passes is None:
            objective = objective or "latency"
        if objective is not None and objective not in typing.get_args(Objective):
            known = ", ".join(typing.get_args(Objective))
            raise SpecError(f"unknown objective {objective!r}", hint=f"known: {known}")
        if objective is not None and self.calib in (None, "random"):
            raise SpecError("a search for the best settings needs real data", hint="give --calib DATA")
        if objective == "latency" and self.engine == "onnxruntime":
            raise SpecError("the search for latency times compiled kernels", hint="leave --engine out")

        def absolute(path: str | None) -> str | None:
            return None if path is None else str(Path(path).absolute())

        preprocess = self.preprocess
        if preprocess is not None and preprocess.endswith(".toml"):
            preprocess = absolute(preprocess)
        return dataclasses.replace(
            self,
            model=str(absolute(self.model)),
            output=absolute(self.output),
            calib=self.calib if self.calib in (None, "random") else absolute(self.calib),
            eval=absolute(self.eval),
            preprocess=preprocess,
            passes=self.pipeline_text(),
            objective=objective,
        )

    def to_toml(self) -> str:
        """A recipe: `graphopt optimize --config recipe.toml` replays the run. Unset options are left out."""
        lines = ["# Replay: graphopt optimize --config recipe.toml -o OUT", "[optimize]"]
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            unset = value is None or value == () or (f.name == "preset" and self.passes)
            if unset or f.name in ("inputs", "output", "overwrite"):
                continue
            lines.append(f"{f.name} = {_toml(value)}")
        if self.inputs:
            lines += ["", "[optimize.inputs]"]
            lines += [f"{_toml(name)} = {_toml(list(shape))}" for name, shape in self.inputs.items()]
        return "\n".join(lines) + "\n"


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The options in a recipe, by field name of Settings. Raises SpecError: unreadable, unknown, wrong type."""
    file = Path(path)
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read recipe {path}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"recipe {path} is not valid TOML: {error}") from error
    unknown = [table for table in content if table != "optimize"]
    if unknown or not isinstance(content.get("optimize"), dict):
        raise SpecError(f"recipe {path} must hold one table [optimize]" + (f", not {unknown[0]!r}" if unknown else ""))
    hints = typing.get_type_hints(Settings)
    options: dict[str, Any] = {}
    for key, value in content["optimize"].items():
        name = key.replace("-", "_")
        if name not in hints:
            near = nearest(name, hints)
            raise SpecError(f"recipe {path}: unknown option {key!r}", hint=f"did you mean {near!r}?" if near else None)
        options[name] = check_option(f"recipe {path}: {key}", value, hints[name])
    return options


def read_pick(path: str | os.PathLike[str], number: int) -> dict[str, Any]:
    """The options that make point `number` of a pareto.json. Raises SpecError: unreadable, or no such point."""
    try:
        front = json.loads(Path(path).read_text(encoding="utf-8"))
        points = {int(point["number"]): str(point["pipeline"]) for point in front["points"]}
        settings = dict(front["settings"])
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"cannot read {path}: {error}") from error
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise SpecError(f"{path} is no pareto.json", hint="it lies in the artifact of `--preset auto`") from error
    if number not in points:
        raise SpecError(f"{path} has no point {number}", hint=f"there are {min(points)} to {max(points)}")
    hints = typing.get_type_hints(Settings)
    unknown = [name for name in settings if name not in hints]
    if unknown:
        raise SpecError(f"{path}: unknown option {unknown[0]!r}")
    given = {k: v for k, v in settings.items() if v is not None}
    checked = {k: check_option(f"{path}: {k}", v, hints[k]) for k, v in given.items()}
    return {**checked, "passes": points[number]}


def _toml(value: Any) -> str:
    """JSON's strings, numbers, booleans and lists are TOML's, but for the surrogate pairs and DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


_INPUT = re.compile(r"^(?P<name>.+?):(?P<dims>\d+(,\d+)*)$")


def parse_input(text: str) -> tuple[str, tuple[int, ...]]:
    """`x:1,3,224,224` -> ("x", (1, 3, 224, 224)). Raises SpecError."""
    match = _INPUT.match(text.strip())
    if match is None:
        raise SpecError(f"cannot read --input {text!r}", hint="write it as name:1,3,224,224")
    shape = tuple(int(d) for d in match["dims"].split(","))
    if 0 in shape:
        raise SpecError(f"--input {text!r}: a dimension of 0 holds no data")
    return match["name"], shape


def check_option(what: str, value: Any, hint: Any) -> Any:
    """A value from a TOML or JSON file as the type `hint` wants it. Raises SpecError, naming `what`."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(h for h in typing.get_args(hint) if h is not type(None))
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        if value not in typing.get_args(hint):
            raise SpecError(f"{what} must be one of {', '.join(typing.get_args(hint))}, not {value!r}")
        return value
    if origin is tuple:  # sizes
        if not (isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value)):
            raise SpecError(f"{what} must be a list of strings, not {value!r}")
        return tuple(value)
    if origin is not None:  # inputs
        if not isinstance(value, dict):
            raise SpecError(f"{what} must be a table of name = [1, 3, 224, 224]")
        shapes = {}
        for name, dims in value.items():
            if not (isinstance(dims, list) and all(isinstance(d, int) and d > 0 for d in dims)):
                raise SpecError(f"{what}.{name} must be a list of positive integers, not {dims!r}")
            shapes[name] = tuple(dims)
        return shapes
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise SpecError(f"{what} must be {hint.__name__}, not {value!r}")
    return value
