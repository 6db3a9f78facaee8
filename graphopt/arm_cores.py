"""ARM cores by LLVM's names, what each can do, and the boards and clouds that have them.

Features are in /proc/cpuinfo's spelling: asimd (NEON), fphp and asimdhp (float16 arithmetic), asimddp (dot products of
bytes, SDOT and UDOT), i8mm (SMMLA, and products of unsigned with signed bytes, USDOT), bf16 (BFMMLA), sve, sve2.

Source: Arm's technical reference manuals of the cores; LLVM's AArch64Processors.td.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from graphopt.errors import SpecError, nearest

_NEON = frozenset({"asimd"})
_HALF = _NEON | {"fphp", "asimdhp"}
_DOT = _HALF | {"asimddp"}
_MATRIX = _DOT | {"i8mm", "bf16"}
_ARMV9 = _MATRIX | {"sve", "sve2"}

ARM_FEATURES: Mapping[str, frozenset[str]] = {
    "generic": _NEON,
    **dict.fromkeys(("cortex-a35", "cortex-a53", "cortex-a57", "cortex-a72", "cortex-a73", "thunderx2t99"), _NEON),
    "carmel": _HALF,
    "a64fx": _HALF | {"sve"},
    **dict.fromkeys(
        ("cortex-a55", "cortex-a75", "cortex-a76", "cortex-a76ae", "cortex-a77", "cortex-a78", "cortex-a78ae",
         "cortex-a78c", "cortex-x1", "neoverse-n1", "tsv110", "apple-a14"),
        _DOT,
    ),
    **dict.fromkeys(("apple-a15", "apple-a16", "apple-m4", "ampere1"), _MATRIX),
    "neoverse-v1": _MATRIX | {"sve"},
    **dict.fromkeys(
        ("cortex-a510", "cortex-a520", "cortex-a710", "cortex-a715", "cortex-a720", "cortex-x2", "cortex-x3",
         "cortex-x4", "neoverse-n2", "neoverse-v2", "grace"),
        _ARMV9,
    ),
}  # fmt: skip
"""By LLVM's `-mcpu`; `generic` is any ARMv8-A. Vectors are taken as NEON's 128 bits, on cores with SVE too."""


_SOLD_AS = {"apple-m1": "apple-a14", "apple-m2": "apple-a15", "apple-m3": "apple-a16"}
"""LLVM's name of the core by the name people know."""


@dataclass(frozen=True)
class Board:
    """Something that is sold: its core, and how many of these there are."""

    core: str
    cores: int
    what: str


BOARDS: Mapping[str, Board] = {
    "rpi3": Board("cortex-a53", 4, "Raspberry Pi 3, Zero 2 W"),
    "rpi4": Board("cortex-a72", 4, "Raspberry Pi 4, 400, Compute Module 4"),
    "rpi5": Board("cortex-a76", 4, "Raspberry Pi 5, 500, Compute Module 5"),
    "rk3588": Board("cortex-a76", 4, "Rockchip RK3588 (its four large cores)"),
    "jetson-nano": Board("cortex-a57", 4, "NVIDIA Jetson Nano"),
    "jetson-xavier": Board("carmel", 8, "NVIDIA Jetson AGX Xavier"),
    "jetson-orin": Board("cortex-a78ae", 12, "NVIDIA Jetson AGX Orin"),
    "graviton2": Board("neoverse-n1", 64, "AWS Graviton 2"),
    "graviton3": Board("neoverse-v1", 64, "AWS Graviton 3"),
    "graviton4": Board("neoverse-v2", 96, "AWS Graviton 4"),
    "altra": Board("neoverse-n1", 80, "Ampere Altra"),
}


def find_core(name: str) -> str:
    """LLVM's name of a core: `cortex-a72`, or shorter, `a72`, `n1`. Raises SpecError with the nearest name."""
    for prefix in ("", "cortex-", "neoverse-", "apple-"):
        core = _SOLD_AS.get(prefix + name, prefix + name)
        if core in ARM_FEATURES:
            return core
    raise SpecError(f"unknown ARM core {name!r}", hint=_near(name, {**ARM_FEATURES, **_SOLD_AS}))


def find_board(name: str) -> Board:
    """Raises SpecError with the nearest name."""
    if name not in BOARDS:
        raise SpecError(f"unknown ARM device {name!r}", hint=_near(name, BOARDS))
    return BOARDS[name]


def _near(name: str, known: Mapping[str, object]) -> str:
    near = nearest(name, known)
    return f"did you mean {near!r}?" if near else f"known: {', '.join(sorted(known))}"
