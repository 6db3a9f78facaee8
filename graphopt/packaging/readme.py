"""The README.md of a package: what it takes and gives, and how to run it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_TVM = {
    "cpp": """\
`include/graphopt/runner.h` is the whole interface; `example/main.cc` uses it.

    cmake -S . -B build && cmake --build build
    build/example -o . . INPUT.npy...
{cross}
A program needs `package.json`, `model/` and `lib/` where it runs; no Python, no compiler.""",
    "python": """\
    pip install numpy apache-tvm-ffi=={ffi}
    python graphopt_model.py INPUT.npz OUTPUT.npz

`graphopt_model.py` has the class `Model`; nothing has to be installed.""",
    "c-static": """\
`run` is a static executable: weights, code and all it needs are in it.

    ./run -o . INPUT.npy...

For programs of your own, `model.h` and `model.o` are the same in C: `cc main.c model.o -lpthread -lm` makes `run`.""",
}
_ONNX_RUNTIME = {
    "cpp": """\
Measured, ONNX Runtime was the fastest engine for this model, so it is what runs it. Get its release for C++ (headers
and `libonnxruntime.so`, version {onnxruntime}); `example/main.cc` uses its own interface.

    cmake -S . -B build -DONNXRUNTIME_ROOT=/where/it/was/unpacked && cmake --build build
    build/example -o . model.onnx INPUT.npy...""",
    "python": """\
Measured, ONNX Runtime was the fastest engine for this model, so it is what runs it.

    pip install numpy onnxruntime=={onnxruntime}
    python graphopt_model.py INPUT.npz OUTPUT.npz

`graphopt_model.py` has the class `Model`; nothing has to be installed.""",
}
_CROSS = """
From another kind of machine: `cmake -S . -B build -DCMAKE_TOOLCHAIN_FILE=toolchain.cmake -DGRAPHOPT_ARCH={arch}`.
"""


def readme(described: Mapping[str, Any]) -> str:
    """The text for what package.json says."""
    versions = described["versions"]
    how = (_TVM if described["arch"] else _ONNX_RUNTIME)[described["runtime"]]
    lines = ["# A model, packed by graphopt", ""]
    for what in ("inputs", "outputs"):
        for each in described[what]:
            shape = ", ".join(map(str, each["shape"]))
            lines.append(f"- {what[:-1]} `{each['name']}`: {each['dtype']} ({shape})")
    for each in described.get("libraries", []):
        lines.append(f"- `{each['file']}`: for {described['arch']}, {each['target']}")
    filled = how.format(
        cross=_CROSS.format(arch=described["arch"]),
        ffi=versions["apache-tvm-ffi"],
        onnxruntime=versions["onnxruntime"],
    )
    return "\n".join([*lines, "", filled, ""])
