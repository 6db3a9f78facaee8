"""One part of a model in ONNX Runtime, reading and writing arrays where they lie."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np

from graphopt.errors import ArtifactError, TargetError
from graphopt.runtime.onnxruntime_engine import failures, one_line


class OnnxRuntimePart:
    """`fixed`: type and shape of the outputs that have static shapes; others are allocated by ONNX Runtime.

    Its threads stop spinning when a run ends, since the next part is another engine's.
    Raises ArtifactError when ONNX Runtime refuses the file.
    """

    def __init__(
        self,
        file: Path,
        inputs: tuple[str, ...],
        outputs: tuple[str, ...],
        fixed: Mapping[str, tuple[np.dtype, tuple[int, ...]]],
        threads: int | None,
    ):
        import onnxruntime

        self.file, self.inputs, self.outputs, self.fixed = file, inputs, outputs, fixed
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.inter_op_num_threads = 1
        if threads is not None:
            options.intra_op_num_threads = threads
        options.add_session_config_entry("session.force_spinning_stop", "1")
        self._failures = failures()
        try:
            self._session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        except self._failures as error:
            raise ArtifactError(f"ONNX Runtime cannot load {file}: {one_line(error)}") from error
        self._binding = self._session.io_binding()

    def run(self, values: MutableMapping[str, Any], into: Mapping[str, np.ndarray]) -> None:
        """Read inputs from `values`, and put the outputs there: those in `into` are written into these arrays, the
        others are ONNX Runtime's own values, which only other such parts read. Raises TargetError."""
        binding = self._binding
        try:
            for name in self.inputs:
                value = values[name]
                if isinstance(value, np.ndarray):
                    binding.bind_cpu_input(name, value if value.flags.c_contiguous else np.ascontiguousarray(value))
                else:
                    binding.bind_ortvalue_input(name, value)
            for name in self.outputs:
                array = into.get(name)
                if array is None:
                    binding.bind_output(name, "cpu")
                else:
                    binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
            self._session.run_with_iobinding(binding)
            if len(into) < len(self.outputs):
                for name, value in zip(self.outputs, binding.get_outputs(), strict=True):
                    values[name] = value
            values.update(into)
        except (*self._failures, ValueError) as error:
            raise TargetError(f"ONNX Runtime failed on {self.file}: {one_line(error)}") from error
        finally:
            binding.clear_binding_inputs()
            binding.clear_binding_outputs()
