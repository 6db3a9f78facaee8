"""The process that runs cases: `python -m tests.fuzz.worker SEED FOLDER`, a number a line on stdin.

It answers each with a line of JSON. Its memory is limited, so that what would eat the machine's fails here.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import traceback
from pathlib import Path

from graphopt import errors
from graphopt import model as models
from graphopt.errors import GraphoptError
from graphopt.inspection import inspect
from graphopt.passes.base import Context
from graphopt.pipeline import Pipeline
from graphopt.plugins import parse_target
from graphopt.rehearsal import rehearse
from graphopt.samples import random_feeds
from graphopt.verify import Reference
from tests.fuzz.cases import make_case

MEMORY_BYTES = 6 << 30
RUN_LIMIT_S = 5.0
LOWERED_SHARE = 4
"""One case in so many is lowered for the CPU target too."""
PASSES = "simplify{use_onnxsim=false},fold-batch-norm"
DOCUMENTED = frozenset({errors.EXIT_FAILURE, errors.EXIT_USAGE, errors.EXIT_ACCURACY, errors.EXIT_DEVICE})


def main(seed: int, folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    for line in sys.stdin:
        print(json.dumps(run_case(seed, int(line), folder)), file=answers, flush=True)


def run_case(seed: int, number: int, folder: Path) -> dict[str, str]:
    """How a case ended: `fine`, `refused` with the error's class, or `finding` with a trace."""
    what = "making the case"
    try:
        path, what = make_case(seed, number, folder)
        stages(path, folder, lower=number % LOWERED_SHARE == 0)
    except GraphoptError as error:
        if "\n" in str(error) or not str(error).strip() or error.exit_code not in DOCUMENTED:
            return {"end": "finding", "what": what, "why": f"not one line, or no exit code: {error!r}"}
        return {"end": "refused", "what": what, "why": type(error).__name__, "text": str(error)}
    except BaseException:  # noqa: BLE001 - whatever it is, it is what we look for
        return {"end": "finding", "what": what, "why": traceback.format_exc(limit=-12)}
    return {"end": "fine", "what": what, "why": ""}


def stages(path: Path, work: Path, *, lower: bool) -> None:
    """What `graphopt optimize` does to a model before it compiles it, and half of the compiler for some."""
    model = models.load(path)
    signature = models.signature(model)
    inspect(model)
    feeds = random_feeds(signature)
    shapes = {name: array.shape for name, array in feeds.items()}
    model = models.fix_inputs(model, shapes)
    rehearse(path, shapes, [feeds], work, RUN_LIMIT_S)
    reference = Reference(model, [feeds], work, RUN_LIMIT_S)
    target = parse_target("cpu{threads=1}")
    made, _ = Pipeline.parse(PASSES).run(model, Context(target.capabilities), reference)
    if lower:
        target.lower(made)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
