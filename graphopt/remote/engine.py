"""A compiled model on another machine, used like one on this."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.errors import DataError, TargetError
from graphopt.remote.address import Address
from graphopt.runtime.tvm_engine import LIBRARY, last_line, read_description


class RemoteEngine:
    """The model in `folder` (model.so and engine.json), uploaded to the server at `address`.

    Raises ArtifactError: a file is missing or damaged; TargetError: no server answers, or it cannot load the library.
    """

    def __init__(self, folder: str | os.PathLike[str], address: Address):
        from tvm import relax, rpc

        self.folder, self.address = Path(folder), address
        description = read_description(self.folder)
        self._inputs = {str(each["name"]): each for each in description["inputs"]}
        self._outputs = [str(each["name"]) for each in description["outputs"]]
        try:
            self._session: Any = rpc.connect(address.host, address.port, address.key)
            self._session.upload(str(self.folder / LIBRARY))
            self._device: Any = self._session.cpu(0)
            self._machine: Any = relax.VirtualMachine(self._session.load_module(LIBRARY), self._device)
        except (RuntimeError, OSError) as error:
            raise TargetError(f"{address} cannot run {self.folder}: {last_line(error)}") from error

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(self._outputs)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name. Raises DataError for an input that is missing or of another shape or type than the model
        takes, TargetError where the server is gone."""
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
        try:
            arguments = [tvm.runtime.tensor(np.ascontiguousarray(feeds[name]), self._device) for name in self._inputs]
            self._machine.set_input("main", *arguments)
            self._machine.invoke_stateful("main")
            found = self._machine.get_outputs("main")
            tensors = [found] if hasattr(found, "numpy") else list(found)
            return {name: each.numpy() for name, each in zip(self._outputs, tensors, strict=True)}
        except (RuntimeError, OSError) as error:
            raise TargetError(f"{self.address} stopped running {self.folder}: {last_line(error)}") from error
