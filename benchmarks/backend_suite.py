"""ONNX's own backend tests through `graphopt.backend`, on both engines: matched, refused by name, or failed.

    python -m benchmarks.backend_suite OUT.json [--engine passes tvm] [--only PATTERN] [--seconds 120]
    python -m benchmarks.backend_suite OUT.json --document

Each engine has a worker process, so that a crash or a hang costs one test; what OUT.json has already is not run again.
A test is *matched* where dtype, shape and numbers (by the tolerance that onnx gives the test) are as expected,
*refused* where graphopt raised one of its documented errors and it names an operator, an input or a value of the model,
and *failed* otherwise. The second form writes the table by operator, docs/operators.md, and what it is made of,
docs/operators.json.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import select
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from graphopt.pipeline import PRESETS

ENGINES = ("passes", "tvm")
STATUSES = ("matched", "refused", "failed")
KINDS = ("node", "simple", "real", "pytorch-converted", "pytorch-operator")
PASSES = os.environ.get("GRAPHOPT_SUITE_PASSES", PRESETS["exact"])
"""What runs before either engine; without onnxsim, which asks a process of its own, the suite takes a third."""
BATCH = 400
"""Tests that one worker process runs before another takes its place."""


@dataclass(frozen=True)
class Case:
    """One test of onnx's suite."""

    name: str
    kind: str
    test: Any
    """onnx's own TestCase."""

    def model(self) -> onnx.ModelProto:
        if self.test.model is not None:
            return self.test.model
        if self.kind == "real":
            return onnx.load(str(_light(self.test.url)))
        return onnx.load(str(Path(self.test.model_dir) / "model.onnx"))

    def data(self, model: onnx.ModelProto) -> Iterator[tuple[list[Any], list[Any]]]:
        """Inputs and expected outputs, one pair a data set."""
        if self.test.data_sets is not None:
            for inputs, outputs in self.test.data_sets:
                yield [_array(x) for x in inputs], [_array(x) for x in outputs]
        elif self.kind == "real":
            yield _light_data(model, _light(self.test.url))
        else:
            for folder in sorted(Path(self.test.model_dir).glob("test_data_set*")):
                yield (
                    _read_all(folder, "input", model.graph.input),
                    _read_all(folder, "output", model.graph.output),
                )


@dataclass(frozen=True)
class Outcome:
    """What became of one test on one engine."""

    name: str
    engine: str
    operator: str
    status: str
    """`matched`, `refused` or `failed`."""
    detail: str = ""
    seconds: float = 0.0


def cases() -> dict[str, Case]:
    """Every test whose data is at hand, by name."""
    from onnx.backend.test.loader import load_model_tests

    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        np.seterr(all="ignore")
        for kind in KINDS:
            for test in load_model_tests(kind=kind):
                if test.url is None or "/data/light/" in test.url:
                    found[test.name] = Case(test.name, kind, test)
    return found


def operator_of(name: str, known: dict[str, Case]) -> str:
    """The operator a test is about: the last node's; of an expanded function's body, that of the test it comes from."""
    whole = re.sub(r"_expanded(_ver\d+)?$", "", name)
    model = known[whole if whole in known else name].model()
    operators = [node for node in model.graph.node if node.op_type not in ("Constant", "Identity")]
    flat = whole.replace("_", "").lower()
    named = [n for n in operators if n.op_type.lower() in flat]
    chosen = max(named, key=lambda n: len(n.op_type)) if named else (operators or list(model.graph.node))[-1]
    kind = known[name].kind
    if kind == "real":
        return "(whole models)"
    return f"{chosen.domain}.{chosen.op_type}" if chosen.domain not in ("", "ai.onnx") else chosen.op_type


def run_case(case: Case, engine: str, operator: str) -> Outcome:
    """Run one test in this process."""
    started = time.perf_counter()
    status, detail = _judged(case, engine)
    return Outcome(case.name, engine, operator, status, detail, round(time.perf_counter() - started, 3))


def _judged(case: Case, engine: str) -> tuple[str, str]:
    from onnx.backend.test.runner import Runner

    from graphopt import backend
    from graphopt.errors import GraphoptError, PassError, VerificationError

    model, rounded = case.model(), False
    try:
        prepared = backend.prepare(model, "CPU", engine=engine, threads=1, passes=PASSES)
        for inputs, expected in case.data(model):
            outputs = prepared.run(inputs)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    Runner.assert_similar_outputs(expected, outputs, case.test.rtol, case.test.atol)
                except AssertionError as error:
                    if not _within_rounding(expected, outputs):
                        return "failed", "wrong result: " + " ".join(str(error).split())[:300]
                    rounded = True
    except (PassError, VerificationError) as error:
        return "failed", f"{type(error).__name__}: {error}"
    except GraphoptError as error:
        text = f"{type(error).__name__}: {error}"
        return ("refused" if _names(model, str(error)) else "failed"), text
    except Exception as error:  # noqa: BLE001 - an undocumented exception is a result here, and a bad one
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        return "failed", f"{type(error).__name__} at {place}: " + " ".join(str(error).split())[:300]
    return "matched", "within rounding" if rounded else ""


def _within_rounding(expected: list[Any], found: tuple[Any, ...]) -> bool:
    """Whether rounding explains the differences: onnx's tolerance is relative to each element, and sums that cancel to
    nearly nothing, or numbers of ten bits, cannot keep to it.

    An element may differ by 4 units roundoff of the largest, times the square root of the number of elements: the
    probabilistic bound (Higham and Mary 2019) of a sum over a whole array.
    """
    for want, have in zip(expected, found, strict=True):
        if not isinstance(want, np.ndarray) or want.dtype not in (np.float16, np.float32, np.float64):
            return False
        if want.shape != have.shape or want.dtype != have.dtype:
            return False
        exact, given = want.astype(np.float64), have.astype(np.float64)
        if not np.array_equal(np.isfinite(exact), np.isfinite(given)):
            return False
        finite = np.isfinite(exact)
        if not finite.any():
            return False
        unit = float(np.finfo(want.dtype).eps) / 2
        bound = 4 * unit * np.sqrt(finite.sum()) * np.abs(exact[finite]).max()
        if np.abs(exact[finite] - given[finite]).max() > bound:
            return False
    return True


def _names(model: onnx.ModelProto, message: str) -> bool:
    """Whether a message says which operator, input or output of the model it is about."""
    words = set(re.split(r"[^\w.]+", message)) | set(re.findall(r"'([^']*)'", message))
    nodes = list(_all_nodes(model))
    names = {schema.name for schema in onnx.defs.get_all_schemas()}
    names |= {node.op_type for node in nodes} | {info.name for info in (*model.graph.input, *model.graph.output)}
    names |= {output for node in nodes for output in node.output if output}
    return bool(words & names) or any(word.rpartition(".")[2] in names for word in words)


def _all_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    pending = [model.graph, *model.functions]
    while pending:
        for node in pending.pop().node:
            yield node
            for attribute in node.attribute:
                pending += [attribute.g] if attribute.HasField("g") else []
                pending += attribute.graphs


def _array(item: Any) -> Any:
    return onnx.numpy_helper.to_array(item) if isinstance(item, onnx.TensorProto) else item


def _light(url: str) -> Path:
    return Path(onnx.__file__).parent.parent / url


def _light_data(model: onnx.ModelProto, path: Path) -> tuple[list[Any], list[Any]]:
    from onnx.backend.test.runner import Runner

    initial = {tensor.name for tensor in model.graph.initializer}
    inputs = [Runner.generate_dummy_data(info) for info in model.graph.input if info.name not in initial]
    outputs = []
    for index in range(len(model.graph.output)):
        tensor = onnx.TensorProto()
        tensor.ParseFromString((path.parent / f"{path.stem}_output_{index}.pb").read_bytes())
        outputs.append(onnx.numpy_helper.to_array(tensor))
    return inputs, outputs


def _read_all(folder: Path, prefix: str, infos: Any) -> list[Any]:
    found = []
    for index in range(len(list(folder.glob(f"{prefix}_*.pb")))):
        content = (folder / f"{prefix}_{index}.pb").read_bytes()
        if infos[index].type.HasField("sequence_type"):
            sequence = onnx.SequenceProto()
            sequence.ParseFromString(content)
            found.append(onnx.numpy_helper.to_list(sequence))
        elif infos[index].type.HasField("optional_type"):
            optional = onnx.OptionalProto()
            optional.ParseFromString(content)
            found.append(onnx.numpy_helper.to_optional(optional))
        else:
            tensor = onnx.TensorProto()
            tensor.ParseFromString(content)
            found.append(onnx.numpy_helper.to_array(tensor))
    return found


# ---- worker processes


def work(engine: str) -> None:
    """Read names of tests from stdin, one a line, and write an outcome for each to what stdout was."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # engines print as they like; only outcomes may go where the parent listens
    known = cases()
    answers.write("ready\n")
    for line in sys.stdin:
        name = line.strip()
        outcome = run_case(known[name], engine, operator_of(name, known))
        answers.write(json.dumps(asdict(outcome)) + "\n")


class Worker:
    """A process that runs tests; `seconds` is the time one may take."""

    def __init__(self, engine: str, seconds: float):
        self.seconds = seconds
        self.done = 0
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.backend_suite", "--work", engine],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=Path(__file__).resolve().parent.parent,
        )
        if self._line(600) != b"ready\n":
            raise SystemExit("the worker did not start")

    def run(self, name: str, times: float = 1) -> dict[str, Any] | str:
        """The outcome, or why there is none; it may take that many times as long as others."""
        assert self.process.stdin is not None
        self.process.stdin.write(name.encode() + b"\n")
        self.process.stdin.flush()
        self.done += 1
        line = self._line(times * self.seconds)
        if line:
            return json.loads(line)
        if line is None:
            self.close()
            return f"not done after {times * self.seconds:g} s"
        return f"the process ended with {self.process.wait()}"

    def _line(self, seconds: float) -> bytes | None:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], seconds)
        return self.process.stdout.readline() if ready else None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def run_suite(names: Iterable[str], engine: str, known: dict[str, Case], seconds: float) -> Iterator[Outcome]:
    """Every test on one engine, in worker processes."""
    worker: Worker | None = None
    for name in names:
        if worker is None or worker.process.poll() is not None or worker.done >= BATCH:
            if worker is not None:
                worker.close()
            worker = Worker(engine, seconds)
        found = worker.run(name, 10 if known[name].kind == "real" else 1)
        if isinstance(found, str):
            found = asdict(Outcome(name, engine, operator_of(name, known), "failed", f"crash: {found}"))
        yield Outcome(**found)
    if worker is not None:
        worker.close()


# ---- the table


def summary(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Counts by engine and operator, and the reasons of refusals, each once with its numbers and names left out."""
    rows = list(rows)
    operators: dict[str, Any] = {}
    for name in sorted({row["operator"] for row in rows}):
        operators[name] = {}
        for engine in ENGINES:
            own = [row for row in rows if row["operator"] == name and row["engine"] == engine]
            found: dict[str, Any] = {status: sum(row["status"] == status for row in own) for status in STATUSES}
            found["rounded"] = sum(row["status"] == "matched" and bool(row["detail"]) for row in own)
            reasons = Counter(_shortened(row["detail"]) for row in own if row["status"] == "refused")
            found["reasons"] = dict(sorted(reasons.items(), key=lambda item: (-item[1], item[0])))
            operators[name][engine] = found
    versions = {n: importlib.metadata.version(n) for n in ("onnx", "onnxruntime", "apache-tvm")}
    return {"versions": versions, "passes": PASSES, "operators": operators}


def _shortened(detail: str) -> str:
    """A refusal without its class, node and advice."""
    text = detail.partition(": ")[2].partition("; the model can stay")[0]
    text = re.sub(r" \(node '[^']*'\)", "", text)
    text = re.sub(r"^ONNX Runtime (cannot load|failed on) the model: ", "", text)
    text = re.sub(r" with name '[^']*'|\(node:'[^']*' ep:'[^']*'\)|Name:'[^']*' ", "", text)
    text = re.sub(r"R\.shape\(\[[^]]*\]\)|Tensor\([^)]*\)", "", text)
    return (text[:137] + "...") if len(text) > 140 else text


def document(found: dict[str, Any]) -> str:
    """The page docs/operators.md from a summary."""
    totals = {e: Counter() for e in ENGINES}
    for row in found["operators"].values():
        for engine in ENGINES:
            totals[engine].update({key: row[engine][key] for key in (*STATUSES, "rounded")})
    versions = ", ".join(f"{name} {version}" for name, version in sorted(found["versions"].items()))
    lines = [
        "# Operators",
        "",
        "What ONNX's own backend tests say of both engines of `graphopt.backend`: `passes` (the exact passes, then",
        "ONNX Runtime) and `tvm` (the exact passes, then compiled for this processor). This page is made by",
        "",
        "    python -m benchmarks.backend_suite OUT.json && python -m benchmarks.backend_suite OUT.json --document",
        "",
        f"with {versions}; passes `{found['passes']}`.",
        "",
        "A test is *matched* where element type, shape and numbers are those expected, within the tolerance that onnx",
        "gives it; *refused* where graphopt raised an error that names the operator and the reason; *failed* where a",
        "number was wrong, something crashed, or an error was none of those documented.",
        "",
        "| engine | tests | matched | of these within rounding only | refused by name | failed |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for engine in ENGINES:
        t = totals[engine]
        count = sum(t[status] for status in STATUSES)
        lines.append(f"| {engine} | {count} | {t['matched']} | {t['rounded']} | {t['refused']} | {t['failed']} |")
    lines += [
        "",
        "*Within rounding only*: onnx's tolerance is relative to each element; where sums cancel to nearly nothing,",
        "and in float16, the rounding of the largest element decides instead (`_within_rounding` in the script).",
        "",
        "| operator | tests | passes: matched | refused | failed | tvm: matched | refused | failed |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in found["operators"].items():
        counts = [row[engine][status] for engine in ENGINES for status in STATUSES]
        tests = max(sum(row[engine][status] for status in STATUSES) for engine in ENGINES)
        lines.append(f"| {name} | {tests} | " + " | ".join(map(str, counts)) + " |")
    for engine in ENGINES:
        lines += ["", f"## Refused by `{engine}`", ""]
        for name, row in found["operators"].items():
            for reason, count in sorted(row[engine]["reasons"].items(), key=lambda item: (-item[1], item[0])):
                lines.append(f"- {name} ({count}): {reason.replace('|', '/').replace('*', '')}")
    return "\n".join(lines) + "\n"


def write_document(rows: Iterable[dict[str, Any]], folder: Path) -> None:
    """operators.json and operators.md."""
    found = summary(rows)
    (folder / "operators.json").write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    (folder / "operators.md").write_text(document(found), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--document", action="store_true", help="write docs/operators.md and docs/operators.json")
    parser.add_argument("--engine", nargs="+", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--only", default="", help="a regular expression that names must match")
    parser.add_argument("--seconds", type=float, default=120, help="the time one test may take")
    parser.add_argument("--again", action="store_true", help="run what did not match once more")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work)
        return
    known = cases()
    rows = json.loads(arguments.out.read_text()) if arguments.out.exists() else []
    if arguments.document:
        write_document(rows, Path(__file__).resolve().parent.parent / "docs")
        return
    done = {(row["name"], row["engine"]): row for row in rows}
    for engine in arguments.engine:
        wanted = [n for n in known if re.search(arguments.only, n)]
        names = [
            n
            for n in wanted
            if done.get((n, engine), {}).get("status") in ((None, "failed", "refused") if arguments.again else (None,))
        ]
        for outcome in run_suite(names, engine, known, arguments.seconds):
            done[outcome.name, engine] = asdict(outcome)
            if outcome.status == "failed":
                print(engine, outcome.name, outcome.detail[:200], flush=True)
            arguments.out.write_text(json.dumps(list(done.values()), indent=0))
        print(engine, dict(Counter(row["status"] for row in done.values() if row["engine"] == engine)), flush=True)


if __name__ == "__main__":
    main()
