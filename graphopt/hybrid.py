"""Hybrid candidates: a variant that TVM refuses, or that loses there, cut into the fewest parts for two engines.

Asked node by node, the target says what it refuses and why (`Target.survey`). The rest is compiled, part by part; a
part that TVM then still refuses, or that ONNX Runtime runs faster, goes to ONNX Runtime too and the model is cut anew.
A variant that compiles but loses is timed piece by piece, and the pieces that lose are given to ONNX Runtime.
What comes out is one more candidate: verified, raced, and delivered only if it is the fastest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx_ir as ir

from graphopt import model as models
from graphopt.candidates import Candidate, Compiler, specialise, verify
from graphopt.compiling import run_apart, survey_apart
from graphopt.errors import DeviceError, TargetError, VerificationError
from graphopt.graph import label
from graphopt.hybrid_times import time_part
from graphopt.measure import Contender
from graphopt.partition import (
    Nodes,
    Part,
    PartModel,
    cut,
    extract,
    inlined,
    known_types,
    record_types,
    segments,
    store_constants,
    work_of,
)
from graphopt.report import CandidateRecord, PartRecord
from graphopt.runtime.hybrid_engine import HybridEngine, PartFiles, write_description
from graphopt.targets.base import TensorType, TuningReport
from graphopt.variants import Variant

ENGINES = "tvm+onnxruntime"
ROUNDS = 6
"""Cuts made at most: each round gives nodes to ONNX Runtime that the one before had compiled."""
SWITCH_S = 20e-6
"""A compiled part must gain more than this over ONNX Runtime: to enter it and to come back takes about as long, and the
parts beside it could be one."""
LOST_S = 100e-6
"""A compiled variant that loses less than this against ONNX Runtime is not cut."""
SEGMENTS = 8
"""Pieces that a variant which loses is timed in."""
LOSES = 1.05
"""A piece loses that takes more than this of ONNX Runtime's time."""
MOST_GUILTY = 4
"""Nodes searched for, one after another, in a part that TVM imports but cannot compile."""


def with_hybrids(candidates: Sequence[Candidate], compiler: Compiler) -> list[Candidate]:
    """`candidates`, and behind each that could not be compiled, or loses, one that is in parts, where that makes sense:
    on this machine's processor only, where ONNX Runtime runs, and with the setting `engine` auto."""
    if not compiler.place.is_here or not compiler.target.runs_in_parts or compiler.settings.engine != "auto":
        return list(candidates)
    found = []
    for candidate in candidates:
        found.append(candidate)
        record, variant = candidate.record, candidate.variant
        if variant is None or record.engine != "tvm" or record.precision != "float32":
            continue
        if record.status == "unavailable":
            maker = _Maker.of(variant, compiler)
            found += [] if maker is None else [maker.candidate(record.reason)]
        elif record.status == "measured" and _loses(candidate, compiler):
            maker = _Maker.of(variant, compiler)
            if maker is not None and maker.give_up_slow_pieces():
                found.append(maker.candidate(""))
    return found


def _loses(candidate: Candidate, compiler: Compiler) -> bool:
    """Whether a compiled variant takes longer than it does in ONNX Runtime, by so much that a cut can pay."""
    assert candidate.variant is not None
    sample, threads = compiler.data.samples[0], compiler.settings.threads or 1
    seconds = time_part(candidate.path, candidate.variant.file, sample, threads)
    return seconds["tvm"] > seconds["onnxruntime"] + LOST_S


@dataclass
class _Built:
    """A compiled part. `seconds`: by engine, once both were timed."""

    folder: Path
    tuning: TuningReport
    seconds: dict[str, float] = field(default_factory=dict)


def _not_worth(ours: float, theirs: float) -> bool:
    return ours + SWITCH_S > theirs


@dataclass
class _Maker:
    """Cuts and builds one variant. `refused`: by position of a node, why it is not compiled."""

    variant: Variant
    compiler: Compiler
    model: ir.Model
    nodes: Nodes
    types: Mapping[str, TensorType]
    work: Sequence[float]
    refused: dict[int, str]
    built: dict[tuple[int, ...], _Built] = field(default_factory=dict)
    searched: int = 0
    """How often a guilty node was searched for."""

    @classmethod
    def of(cls, variant: Variant, compiler: Compiler) -> _Maker | None:
        """None where the target cannot say what it refuses, or it is no node that it refuses: an input, say."""
        model = specialise(inlined(variant.model), compiler.data.samples[0])
        types = known_types(model, compiler.work)
        try:
            survey = survey_apart(model, compiler.target, types, compiler.work)
        except TargetError:
            return None
        if survey is None:
            return None
        types = {**types, **survey.types}
        record_types(model, types)
        store_constants(model, survey.constants)
        nodes = Nodes.of(model, survey.refused)
        refused = {
            position: survey.refused[str(value.name)]
            for position, node in enumerate(nodes.nodes)
            for value in node.outputs
            if str(value.name) in survey.refused
        }
        return cls(variant, compiler, model, nodes, types, work_of(model, nodes, types), refused)

    def give_up_slow_pieces(self) -> bool:
        """Time the model piece by piece and give those to ONNX Runtime that are slower compiled. False where these are
        none, or all, or a piece does not compile: then there is nothing to cut."""
        pieces = [Part("tvm", each, "") for each in segments(self.nodes, self.work, SEGMENTS)]
        parts = extract(self.model, self.nodes, pieces, self.types)
        if self._build(parts, tune=False):
            return False
        folder = Path(tempfile.mkdtemp(prefix=f"{self.variant.name}-pieces-", dir=self.compiler.work))
        self._write(folder, parts)
        slow = self._slower(folder, parts, lambda ours, theirs: ours > LOSES * theirs)
        self.built.clear()
        if not slow or len(slow) == len(self.nodes.nodes):
            return False
        self.refused.update(slow)
        return True

    def candidate(self, reason: str) -> Candidate:
        """The candidate, with its status. `reason`: why the whole variant could not be compiled."""
        if not self.refused:
            self.refused.update(dict.fromkeys(self._guilty(tuple(range(len(self.nodes.nodes)))), reason))
        folder = Path(tempfile.mkdtemp(prefix=f"{self.variant.name}-hybrid-", dir=self.compiler.work))
        try:
            parts = self._settled(folder)
            with self.compiler.place.open(Contender.hybrid(folder), None) as run:
                outputs = [run(sample) for sample in self.compiler.reference.samples]
            errors = verify(outputs, self.variant, self.compiler.reference)
        except VerificationError as error:
            return self._candidate(folder, "wrong", str(error))
        except TargetError as error:
            if isinstance(error, DeviceError):
                raise
            return self._candidate(folder, "unavailable", str(error))
        made = self._candidate(folder, "measured")
        tuning = _joined([self.built[p.part.nodes].tuning for p in parts if p.part.engine == "tvm"])
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        record = dataclasses.replace(
            made.record,
            size_bytes=size,
            errors=errors,
            tuning=dataclasses.asdict(tuning),
            parts=tuple(self._record(part) for part in parts),
        )
        return dataclasses.replace(made, record=record)

    def _candidate(self, folder: Path, status: str, reason: str = "") -> Candidate:
        name = f"{self.variant.name} · {ENGINES}"
        return Candidate(CandidateRecord(name, self.variant.name, "hybrid", status, reason), self.variant, folder)

    def _settled(self, folder: Path) -> list[PartModel]:
        """Cut, build and time until every compiled part can stay; `folder` then holds them all.

        Raises TargetError where no part is left for TVM.
        """
        for number in range(ROUNDS):
            parts = extract(self.model, self.nodes, self._cut(), self.types)
            refused = self._build(parts)
            if not refused:
                self._write(folder, parts)
                run_apart(folder, self.compiler.target, self.compiler.reference.samples)
                refused = self._slower(folder, parts)
            if not refused:
                return parts
            if number == ROUNDS - 1:
                break
            self.refused.update(refused)
        raise TargetError(f"after {ROUNDS} cuts there are still parts that TVM refuses or loses")

    def _cut(self) -> list[Part]:
        parts = cut(self.nodes, self.refused, self.work)
        if all(part.engine != "tvm" for part in parts):
            raise TargetError(f"no part of it is worth compiling: {parts[0].why}" if parts else "it has no nodes")
        return parts

    def _build(self, parts: Sequence[PartModel], tune: bool = True) -> dict[int, str]:
        """Compile what is not compiled yet. Nodes that TVM turned out to refuse, and why."""
        refused: dict[int, str] = {}
        total = sum(self.work)
        for each in parts:
            key = each.part.nodes
            if each.part.engine != "tvm" or key in self.built:
                continue
            folder = Path(tempfile.mkdtemp(prefix=f"{self.variant.name}-part-", dir=self.compiler.work))
            seconds = self.compiler.settings.tune_seconds if tune else 0.0
            share = seconds * sum(self.work[i] for i in key) / max(total, 1e-12)
            try:
                tuning = self.compiler.build_static(each.model, folder, "float32", share)
            except TargetError as error:
                if isinstance(error, DeviceError):
                    raise
                guilty = [i for i in key if label(self.nodes.nodes[i]) == error.node] or self._guilty(key)
                refused.update(dict.fromkeys(guilty or key, error.what))
            else:
                self.built[key] = _Built(folder, tuning)
        return refused

    def _guilty(self, key: tuple[int, ...]) -> list[int]:
        """The first node without which, and all after it, a part compiles: by halving. Empty after MOST_GUILTY."""
        if self.searched == MOST_GUILTY:
            return []
        self.searched += 1
        good, bad = 0, len(key)
        with self.compiler.progress.task("looking for what TVM cannot compile", len(key).bit_length()) as advance:
            while bad - good > 1:
                middle = (good + bad) // 2
                good, bad = (middle, bad) if self._compiles(key[:middle]) else (good, middle)
                advance(1)
        return [key[bad - 1]]

    def _compiles(self, some: tuple[int, ...]) -> bool:
        rest = tuple(i for i in range(len(self.nodes.nodes)) if i not in set(some))
        parts = [Part("tvm", some, ""), Part("onnxruntime", rest, "")]
        first = extract(self.model, self.nodes, parts, self.types)[0]
        with tempfile.TemporaryDirectory(dir=self.compiler.work) as folder:
            try:
                self.compiler.build_static(first.model, Path(folder), "float32", 0)
            except TargetError as error:
                if isinstance(error, DeviceError):
                    raise
                return False
        return True

    def _slower(
        self, folder: Path, parts: Sequence[PartModel], slower: Callable[[float, float], bool] = _not_worth
    ) -> dict[int, str]:
        """Nodes of compiled parts that ONNX Runtime should run, with the figures; `slower`: of the seconds in TVM and
        in ONNX Runtime."""
        threads = self.compiler.settings.threads or 1
        engine = HybridEngine(folder, threads)
        refused: dict[int, str] = {}
        for number, each in enumerate(parts):
            if each.part.engine != "tvm":
                continue
            built = self.built[each.part.nodes]
            if not built.seconds:
                feeds = engine.inputs_of(self.compiler.data.samples[0], number)
                file = self.compiler.work / "part.onnx"
                models.save(each.model, file)
                built.seconds.update(time_part(built.folder, file, feeds, threads))
            ours, theirs = built.seconds["tvm"], built.seconds["onnxruntime"]
            if slower(ours, theirs):
                why = f"not faster in TVM, {ours * 1e3:.3f} ms against {theirs * 1e3:.3f} ms"
                refused.update(dict.fromkeys(each.part.nodes, why))
        return refused

    def _write(self, folder: Path, parts: Sequence[PartModel]) -> None:
        """Everything that `HybridEngine` opens, in place of what was there."""
        shutil.rmtree(folder)
        folder.mkdir()
        files = []
        for number, each in enumerate(parts):
            compiled = each.part.engine == "tvm"
            path = f"part-{number}" if compiled else f"part-{number}.onnx"
            if compiled:
                shutil.copytree(self.built[each.part.nodes].folder, folder / path)
            else:
                models.save(each.model, folder / path)
            files.append(PartFiles(each.part.engine, path, each.inputs, each.outputs))
        types = {name: (np.dtype(kind.dtype), kind.shape) for name, kind in self.types.items()}
        fed = [s.name for s in models.signature(self.model).inputs]
        made = {name for file in files for name in file.outputs}
        write_description(
            folder,
            {name: types[name] for name in fed},
            [str(value.name) for value in self.model.graph.outputs],
            {name: kind for name, kind in types.items() if name in made},
            files,
        )

    def _record(self, each: PartModel) -> PartRecord:
        nodes = [self.nodes.nodes[i] for i in each.part.nodes]
        built = self.built.get(each.part.nodes)
        return PartRecord(
            each.part.engine,
            len(nodes),
            dict(Counter(node.op_type for node in nodes).most_common()),
            label(nodes[0]),
            label(nodes[-1]),
            each.part.why,
            each.inputs,
            each.outputs,
            {} if built is None else dict(built.seconds),
        )


def _joined(reports: Sequence[TuningReport]) -> TuningReport:
    """One report for all compiled parts."""
    first, *others = reports
    if not others:
        return first
    return TuningReport(
        tasks=sum(r.tasks for r in reports),
        from_database=sum(r.from_database for r in reports),
        trials=sum(r.trials for r in reports),
        seconds=sum(r.seconds for r in reports),
        digest=hashlib.sha256("".join(r.digest for r in reports).encode()).hexdigest(),
        rows=tuple(row for r in reports for row in r.rows),
        stopped_early=any(r.stopped_early for r in reports),
        peaks=first.peaks,
        unit=first.unit,
    )
