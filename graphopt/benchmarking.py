"""`graphopt bench` and `graphopt compare`: ONNX files, artifacts or saved figures, by path."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from graphopt import calibration, samples
from graphopt import model as models
from graphopt.errors import ArtifactError, DataError, ModelError
from graphopt.measure import (
    Comparison,
    Contender,
    Leniency,
    PairedResult,
    compare,
    compare_saved,
    race_afresh,
    time_reference,
)
from graphopt.measure.saved import STRICT
from graphopt.progress import Progress
from graphopt.runtime.artifact import COMPILED, MODEL, is_artifact, load, read_manifest, require_trust

SESSIONS = 3
"""Of fresh processes, in one `bench`."""
Shapes = Mapping[str, tuple[int, ...]]


def bench_models(
    paths: Sequence[str],
    threads: int | None,
    seconds: float,
    data: str | None,
    shapes: Shapes,
    seed: int,
    progress: Progress,
    remote: str | None = None,
    trust: bool = False,
) -> PairedResult:
    """Race models that take the same inputs, on this machine or on a `remote` device: there, compiled artifacts only.
    `trust` as in `graphopt.load`.

    Raises ModelError when they take others, ArtifactError for no artifact, or one not trusted, and what
    `connected` raises.
    """
    if remote is not None:
        for path in paths:
            if is_artifact(path):
                require_trust(path, trust)
        return _bench_remote(paths, remote, threads, seconds, sample_feeds(paths, data, shapes, seed), seed, progress)
    contenders = _contenders(paths, trust)
    feeds = sample_feeds(paths, data, shapes, seed)
    result = race_afresh(
        contenders, [feeds] * SESSIONS, threads=threads or _cores(), seconds=seconds, seed=seed, progress=progress
    )
    return replace(result, reference=time_reference(result.threads))


def _bench_remote(
    paths: Sequence[str],
    remote: str,
    threads: int | None,
    seconds: float,
    feeds: Mapping[str, np.ndarray],
    seed: int,
    progress: Progress,
) -> PairedResult:
    from graphopt.places.device import OnDevice
    from graphopt.remote.address import parse_address

    for path in paths:
        if not is_artifact(path) or not (Path(path) / COMPILED).is_dir():
            raise ArtifactError(f"{path} is no compiled artifact, and nothing else runs on a remote device")
    contenders = [
        Contender.compiled(Path(path) / COMPILED, each.name) for path, each in zip(paths, _named(paths), strict=True)
    ]
    place = OnDevice(parse_address(remote))
    cores = threads or len(place.device.cores) or 1
    return place.race(
        contenders, [feeds] * SESSIONS, threads=cores, seconds=seconds, seed=seed, progress=progress
    )  # fmt: skip


def compare_paths(
    base: str,
    new: str,
    max_regression: float,
    threads: int | None,
    seconds: float,
    shapes: Shapes,
    seed: int,
    progress: Progress,
    leniency: Leniency = STRICT,
    trust: bool = False,
) -> Comparison:
    """Two models side by side, or two saved `latency.json` (see `leniency`). Raises DataError for one of each; `trust`
    as in `graphopt.load`."""
    saved = [path.endswith(".json") for path in (base, new)]
    if all(saved):
        (before, delivered), (after, delivered_now) = _read_saved(base), _read_saved(new)
        return compare_saved(
            before,
            after,
            max_regression=max_regression,
            base_name=delivered,
            new_name=delivered_now,
            leniency=leniency,
        )
    if any(saved):
        raise DataError(
            "saved figures can only be compared with saved figures", hint="give two models, or two latency.json files"
        )
    contenders = _contenders([base, new], trust)
    feeds = sample_feeds([base, new], None, shapes, seed)
    return compare(
        contenders[0],
        contenders[1],
        feeds,
        max_regression=max_regression,
        threads=threads or _cores(),
        seconds=seconds,
        seed=seed,
        progress=progress,
    )


def _cores() -> int:
    return os.cpu_count() or 1


def _contenders(paths: Sequence[str], trust: bool) -> list[Contender]:
    for path in paths:
        if is_artifact(path):
            load(path, 1, trust)  # a damaged artifact is told here, in one line
        elif Path(path).is_dir():
            raise ArtifactError(f"{path} is not an artifact: it has no manifest.json")
        else:
            models.load(path)
    return _named(paths, trust)


def _named(paths: Sequence[str], trust: bool = False) -> list[Contender]:
    names = [Path(os.path.normpath(p)).name for p in paths]
    labels = [n if names.count(n) == 1 else f"{n} ({i + 1})" for i, n in enumerate(names)]
    return [Contender.of(path, label, trust) for path, label in zip(paths, labels, strict=True)]


def sample_feeds(paths: Sequence[str], data: str | None, shapes: Shapes, seed: int) -> dict[str, np.ndarray]:
    """One sample that all models take: in the shapes the first artifact was compiled for, unless told otherwise."""
    if not shapes:
        for path in paths:
            if is_artifact(path):
                compiled = read_manifest(Path(path).absolute()).get("compiled_shapes", {})
                shapes = {name: tuple(shape) for name, shape in compiled.items()}
                break
    signatures = []
    for path in paths:
        model = models.load(model_file(path))
        signatures.append(models.signature(models.fix_inputs(model, shapes)))
    first = signatures[0]
    for path, other in zip(paths[1:], signatures[1:], strict=True):
        if [(s.name, s.dtype) for s in first.inputs] != [(s.name, s.dtype) for s in other.inputs]:
            raise ModelError(
                f"{path} takes other inputs than {paths[0]}: {', '.join(map(str, other.inputs))} "
                f"and {', '.join(map(str, first.inputs))}",
                hint="only models with the same inputs can be timed side by side",
            )
    if data is not None:
        return next(iter(calibration.load_dataset(data, first).batches(1)))
    return samples.random_feeds(first, seed)


def model_file(path: str) -> Path:
    """The ONNX file: itself, or the one inside an artifact."""
    return Path(path) / MODEL if is_artifact(path) else Path(path)


def _read_saved(path: str) -> tuple[PairedResult, str | None]:
    """Saved figures, and which contender an artifact's are about."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"no such file: {path}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return PairedResult.from_dict(content), content.get("delivered") if isinstance(content, dict) else None
