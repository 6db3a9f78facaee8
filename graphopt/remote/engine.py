"""A compiled model on another machine, used like one on this."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.errors import DataError
from graphopt.remote.address import Address
from graphopt.remote.device import check_gpu, check_instructions, check_memory
from graphopt.remote.session import Session, connected
from graphopt.runtime.tvm_engine import LIBRARY, read_description


class RemoteEngine:
    """The model in `folder` (model.so and engine.json), uploaded to the server at an address, or within a session.

    `name` tells libraries of one session apart. A context; it ends the session that it began.
    Raises ArtifactError: a file is missing or damaged; DeviceError: no server answers; TargetError: the device lacks
    instructions or memory for it, or cannot load the library.
    """

    def __init__(self, folder: str | os.PathLike[str], server: Address | Session, name: str = LIBRARY):
        from tvm import relax

        self.folder = Path(folder)
        description = read_description(self.folder)
        self._inputs = {str(each["name"]): each for each in description["inputs"]}
        self._outputs = [str(each["name"]) for each in description["outputs"]]
        self._ending = contextlib.ExitStack()
        self._session = self._ending.enter_context(connected(server)) if isinstance(server, Address) else server
        device, where = self._session.device, self._session.where
        check_instructions(description["arch"], frozenset(description["features"]), device, where, str(self.folder))
        on_gpu = description.get("device") == "cuda"
        if on_gpu:
            check_gpu(description["gpu"], device, where, str(self.folder))
        self._holds = self._session.gpu if on_gpu else self._session.processor
        """Where inputs and outputs are."""
        check_memory(self.folder, device, where)
        module = self._session.load(self.folder / LIBRARY, name)
        with self._session.told(f"load {self.folder}"):
            self._machine: Any = relax.VirtualMachine(module, self._holds)

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(self._outputs)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name. Raises DataError for an input that is missing or of another shape or type than the model
        takes, DeviceError where the server is gone, TargetError where the device cannot run it."""
        self.feed(feeds)
        with self._session.told(f"run {self.folder}"):
            self._machine.invoke_stateful("main")
            found = self._machine.get_outputs("main")
            tensors = [found] if hasattr(found, "numpy") else list(found)
            return {name: each.numpy() for name, each in zip(self._outputs, tensors, strict=True)}

    def feed(self, feeds: Mapping[str, np.ndarray]) -> None:
        """Send the inputs of the next runs. Raises as `run`."""
        import tvm

        for name, wanted in self._inputs.items():
            array = feeds.get(name)
            if array is None:
                raise DataError(f"input {name!r} is missing")
            if list(array.shape) != wanted["shape"] or array.dtype != np.dtype(wanted["dtype"]):
                raise DataError(
                    f"input {name!r} is {array.dtype}{list(array.shape)}, the model takes "
                    f"{wanted['dtype']}{wanted['shape']}"
                )
        with self._session.told(f"run {self.folder}"):
            arrays = [np.ascontiguousarray(feeds[name]) for name in self._inputs]
            self._machine.set_input("main", *(tvm.runtime.tensor(each, self._holds) for each in arrays))

    def times_s(self, runs: int) -> tuple[float, ...]:
        """Seconds of `runs` runs, by the device's own clock, after one that does not count. `feed` first."""
        with self._session.told(f"time {self.folder}"):
            timer = self._machine.time_evaluator("invoke_stateful", self._holds, number=1, repeat=runs)
            return tuple(float(s) for s in timer("main").results)

    def close(self) -> None:
        """Let go of what lies on the device, and of the session if it is this engine's own."""
        self._machine = None
        self._ending.close()

    def __enter__(self) -> RemoteEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
