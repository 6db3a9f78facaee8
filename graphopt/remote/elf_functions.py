"""The functions of a shared library for a 64-bit little-endian processor, from its symbol table.

Source: System V Application Binary Interface, chapter 4 (sections, symbol table); ELF-64 Object File Format 1.5.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from graphopt.errors import ArtifactError

_SYMTAB = 2
"""Type of the section with all symbols, local ones too."""
_FUNCTION = 2
_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")


@dataclass(frozen=True, order=True)
class Function:
    """`size` bytes of code, `address` bytes behind where the library is loaded."""

    address: int
    size: int
    name: str


def read_functions(library: Path) -> list[Function]:
    """In the order of addresses. Raises ArtifactError: no ELF library, damaged, or stripped of its symbols."""
    try:
        content = library.read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot read {library}: {error.strerror}") from error
    if content[:6] != b"\x7fELF\x02\x01":
        raise ArtifactError(f"{library} is no library for a 64-bit processor")
    try:
        (offset,) = struct.unpack_from("<Q", content, 40)
        size, count = struct.unpack_from("<HH", content, 58)
        sections = [_SECTION.unpack_from(content, offset + i * size) for i in range(count)]
        found = [
            each for section in sections if section[1] == _SYMTAB for each in _functions(content, sections, section)
        ]
    except (struct.error, IndexError, ValueError, OverflowError) as error:
        raise ArtifactError(f"{library} is damaged: {error}") from error
    if not found:
        raise ArtifactError(f"{library} has no symbols: it was stripped")
    return sorted(found)


def _functions(content: bytes, sections: list[tuple[int, ...]], table: tuple[int, ...]) -> list[Function]:
    _, _, _, _, start, length, link, _, _, _ = table
    names = sections[link][4]
    found = []
    for at in range(start, start + length, _SYMBOL.size):
        name, info, _, section, address, size = _SYMBOL.unpack_from(content, at)
        if info & 15 == _FUNCTION and section and size:
            end = content.index(b"\0", names + name)
            found.append(Function(address, size, content[names + name : end].decode(errors="replace")))
    return found
