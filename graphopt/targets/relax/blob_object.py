"""An object file that holds one read-only array: how constants get into a library without passing a compiler.

TVM packs a program's bytecode and constants into one blob and has LLVM compile it as an array: 4 s for the 100 MB of
ResNet-50. What comes out is a section and a symbol, which is written here directly.

Source: System V Application Binary Interface, chapter 4 (object files), ELF-64.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, NamedTuple

from graphopt.errors import TargetError

SYMBOL = "__tvm_ffi__library_bin"
"""Where TVM's loader looks for a library's bytecode and constants."""
ALIGNMENT = 64
_MACHINES = {"x86_64": 62, "aarch64": 183}
_RELOCATABLE, _PROGBITS, _SYMTAB, _STRTAB = 1, 1, 2, 3
_ALLOCATED = 2
_GLOBAL_OBJECT = (1 << 4) | 1
_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL_ENTRY = struct.Struct("<IBBHQQ")


class _Section(NamedTuple):
    name: str
    kind: int
    content: Any
    flags: int = 0
    link: int = 0
    info: int = 0
    alignment: int = 1
    entry_bytes: int = 0


def write(content: Any, arch: str, path: Path, symbol: str = SYMBOL) -> None:
    """Write a relocatable ELF-64 file for `arch` with `content` (a buffer of bytes) under the name `symbol`.

    Raises TargetError for an architecture whose number is not known here.
    """
    if arch not in _MACHINES:
        raise TargetError(f"no object file format is known for {arch}", hint=f"known: {', '.join(_MACHINES)}")
    data = memoryview(content).cast("B")
    symbols = bytes(_SYMBOL_ENTRY.size) + _SYMBOL_ENTRY.pack(1, _GLOBAL_OBJECT, 0, 1, 0, len(data))
    names = b"\0" + symbol.encode() + b"\0"
    sections = [
        _Section("", 0, b"", alignment=0),
        _Section(".rodata", _PROGBITS, data, flags=_ALLOCATED, alignment=ALIGNMENT),
        _Section(".symtab", _SYMTAB, symbols, link=3, info=1, alignment=8, entry_bytes=_SYMBOL_ENTRY.size),
        _Section(".strtab", _STRTAB, names),
        _Section(".note.GNU-stack", _PROGBITS, b""),  # its presence says that no stack need be executable
    ]
    _write_sections(sections, _MACHINES[arch], path)


def _write_sections(sections: list[_Section], machine: int, path: Path) -> None:
    named = [*sections, _Section(".shstrtab", _STRTAB, b"")]
    table, starts = b"", []
    for section in named:
        starts.append(len(table))
        table += section.name.encode() + b"\0"
    named[-1] = named[-1]._replace(content=table)
    headers, at = [], _HEADER.size
    with path.open("wb") as file:
        file.seek(at)
        for section, start in zip(named, starts, strict=True):
            padding = -at % max(section.alignment, 1)
            file.write(bytes(padding))
            file.write(section.content)
            at += padding
            size = len(section.content)
            headers.append(
                _SECTION.pack(
                    start, section.kind, section.flags, 0, at if section.kind else 0, size,
                    section.link, section.info, section.alignment, section.entry_bytes,
                )
            )  # fmt: skip
            at += size
        padding = -at % 8
        file.write(bytes(padding) + b"".join(headers))
        identity = b"\x7fELF" + bytes([2, 1, 1])  # 64 bits, little endian, version 1
        file.seek(0)
        file.write(
            _HEADER.pack(
                identity, _RELOCATABLE, machine, 1, 0, 0, at + padding, 0,
                _HEADER.size, 0, 0, _SECTION.size, len(named), len(named) - 1,
            )
        )  # fmt: skip
