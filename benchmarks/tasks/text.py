"""Stories: the likelihood of the text that is documented upstream, and the text that comes out greedily."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from shared_data import SHARED

from graphopt.runtime.onnxruntime_engine import OnnxRuntimeEngine
from tasks.base import Outcome, Run, Task, arrays_file, from_arrays

TOKENS, LENGTH, BOS = 200, 256, 1
BEGINNING = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
"""Of the documented text, which is the float model's greedy one."""


@dataclass(frozen=True)
class Stories(Task):
    """A causal decoder at a fixed length: what is behind the last token does not matter."""

    @property
    def inputs(self) -> tuple[str, ...]:
        return (f"input_ids:1,{LENGTH}",)

    def arguments(self, work: Path) -> list[str]:
        """24 stories drawn from the float model, at temperature 1."""

        def make() -> dict[str, np.ndarray]:
            run, rng = OnnxRuntimeEngine(self.path).run, np.random.default_rng(0)
            tokens = np.full((24, 1), BOS, np.int64)
            while tokens.shape[1] < LENGTH:
                logits = run({"input_ids": tokens})["logits"][:, -1].astype(np.float64)
                drawn = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
                tokens = np.concatenate([tokens, drawn[:, None]], axis=1)
            return {"input_ids": tokens}

        return from_arrays(arrays_file(work, self.name, make), 16)

    def outcome(self, run: Run, work: Path) -> Outcome:
        documented = np.load(arrays_file(work, "documented-text", lambda: {"tokens": self._documented()}))["tokens"]
        logits = run({"input_ids": _padded(documented)})["logits"][0, :TOKENS].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        likelihood = logits[np.arange(TOKENS), documented[1:]] - np.log(np.exp(logits).sum(axis=1))
        return {"likelihood": likelihood, "greedy": _greedy(run), "documented": documented}

    def figures(self, outcome: Outcome) -> dict[str, float]:
        differ = np.flatnonzero(outcome["greedy"] != outcome["documented"])
        same = int(differ[0]) - 1 if len(differ) else TOKENS
        return {
            f"NLL of {TOKENS} tokens": -float(outcome["likelihood"].mean()),
            "greedy tokens as documented": same,
        }

    def _documented(self) -> np.ndarray:
        tokens = _greedy(OnnxRuntimeEngine(self.path).run)
        text = _text(tokens)
        if not text.startswith(BEGINNING):
            raise SystemExit(f"the float model's greedy text is not the documented one, but begins {text[:100]!r}")
        return tokens


def _padded(tokens: np.ndarray) -> np.ndarray:
    return np.concatenate([tokens, np.full(LENGTH - len(tokens), BOS)])[None].astype(np.int64)


def _greedy(run: Run) -> np.ndarray:
    """BOS and the TOKENS most likely ones."""
    tokens = np.array([BOS])
    while len(tokens) <= TOKENS:
        best = run({"input_ids": _padded(tokens)})["logits"][0, len(tokens) - 1].argmax()
        tokens = np.append(tokens, best)
    return tokens


def _text(tokens: np.ndarray) -> str:
    data = (SHARED / "models" / "stories260k.tok512.bin").read_bytes()
    pieces, place = [], 4
    while place < len(data):
        (length,) = struct.unpack_from("<I", data, place + 4)
        pieces.append(data[place + 8 : place + 8 + length])
        place += 8 + length
    return b"".join(pieces[token] for token in tokens[1:]).decode().strip()
