"""Runs the model of this package in ONNX Runtime. It needs numpy and onnxruntime; nothing of it has to be installed.

    from graphopt_model import Model

    model = Model()                      # the folder this file lies in
    outputs = model.run({"image": array})

Or once, from the command line: python graphopt_model.py INPUT.npz OUTPUT.npz
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = 1
"""Of package.json."""


class Error(Exception):
    """What went wrong, in a sentence."""


class Model:
    """A loaded model. `threads` work inside an operator; None or 0: ONNX Runtime's choice.

    Raises Error where a file is missing or damaged or onnxruntime is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str] = Path(__file__).parent, threads: int | None = None):
        self.folder = Path(folder)
        described = _read(self.folder / "package.json")
        path = self.folder / described["model"]["file"]
        try:
            content = path.read_bytes()
        except OSError as error:
            raise Error(f"{path} cannot be read: {error.strerror}") from error
        if hashlib.sha256(content).hexdigest() != described["model"]["sha256"]:
            raise Error(f"{path} is damaged: it is not the file that was packed")
        try:
            import onnxruntime
        except ImportError as error:
            raise Error(f"onnxruntime is not installed; pip install onnxruntime=={_version(described)}") from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.inter_op_num_threads = 1
        options.intra_op_num_threads = threads or 0
        self._run: Any
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's own exceptions share no base
            raise Error(f"{path} cannot be loaded: {_one_line(error)}") from error
        self._run = session.run
        self.inputs: dict[str, tuple[str, tuple[Any, ...]]] = _signature(described["inputs"])
        """Element type and shape by name; a dimension that has a name may be of any length."""
        self.outputs: dict[str, tuple[str, tuple[Any, ...]]] = _signature(described["outputs"])

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs by name. Raises Error where inputs are wrong or the model fails."""
        try:
            return dict(zip(self.outputs, self._run(list(self.outputs), dict(feeds)), strict=True))
        except Exception as error:
            raise Error(f"the model failed: {_one_line(error)}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Error(f"{path} cannot be read: {error}") from error
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        raise Error(f"{path} is not of format {FORMAT}, which this loader reads")
    return described


def _version(described: Mapping[str, Any]) -> str:
    return described["versions"]["onnxruntime"]


def _signature(described: list[dict[str, Any]]) -> dict[str, tuple[str, tuple[Any, ...]]]:
    return {each["name"]: (each["dtype"], tuple(each["shape"])) for each in described}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def main() -> int:
    """Run once: INPUT.npz has an array for each input."""
    if len(sys.argv) != 3:
        sys.stderr.write("usage: python graphopt_model.py INPUT.npz OUTPUT.npz\n")
        return 2
    try:
        with np.load(sys.argv[1]) as arrays:
            feeds = {name: arrays[name] for name in arrays.files}
        np.savez(sys.argv[2], **Model().run(feeds))  # pyright: ignore[reportArgumentType]
    except (Error, OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
