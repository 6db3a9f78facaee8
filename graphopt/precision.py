"""Compile with bfloat16 images and weights: `--precision bf16`.

    y = round(f(round(x), round(w)))        round: float32 -> bfloat16, nearest even, 8 bits of significand

What it does: next to the float32 candidates, each exact variant is also compiled with images and weights stored as
bfloat16. Products of bfloat16 numbers are exact in float32 and are summed there; bias, activation and residual are
float32 in registers; a value is rounded once, where it is stored. Inputs and outputs of the model stay float32.

Applies when: the target has amx_bf16 or avx512_bf16. Elsewhere it is refused, for emulation would be slower.

Fidelity: lossy. Each stored value has a relative error of at most 2^-8. With evaluation data the candidate is judged
by its accuracy through the compiled engine (`--max-drop`, or `--min-snr` where outputs are no classes); without, by the
signal-to-noise ratio of every output on the verification samples, at least `--min-snr`. It is delivered only if it
keeps the bound and is faster. Quantized variants are not compiled this way.

Source: Kalamkar et al., A Study of BFLOAT16 for Deep Learning Training, arXiv:1905.12322, 2019.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from graphopt.errors import SpecError, VerificationError
from graphopt.settings import Settings
from graphopt.targets.base import Target
from graphopt.verify import OutputError

BFLOAT16 = "bfloat16"
"""A target's word; settings, reports and the command line say `bf16`."""


def narrowed(target: Target) -> Target:
    """The target that compiles in bfloat16. Raises SpecError for one that has no such option, TargetError where the
    processor lacks the instructions."""
    if not hasattr(target, "precision"):
        raise SpecError(f"the target {target.name} has no precision bf16", hint="use --precision float32")
    found = dataclasses.replace(target, precision=BFLOAT16)  # pyright: ignore[reportCallIssue]
    found.check_precision()  # pyright: ignore[reportAttributeAccessIssue]
    return found


def settled(settings: Settings, target: Target) -> tuple[Settings, Target]:
    """`--precision bf16` and `cpu{precision=bf16}` mean the same: float32 stays a candidate, bfloat16 joins it.

    Raises SpecError and TargetError as `narrowed` does, and SpecError where only ONNX Runtime is allowed.
    """
    if getattr(target, "precision", None) == BFLOAT16:
        settings = dataclasses.replace(settings, precision="bf16")
        target = dataclasses.replace(target, precision="float32")  # pyright: ignore[reportCallIssue]
    if settings.precision == "bf16":
        if settings.engine == "onnxruntime":
            raise SpecError("--precision bf16 needs the compiled engine", hint="leave --engine out, or say tvm")
        narrowed(target)
    return settings, target


def check_noise(errors: Sequence[OutputError], min_snr: float, who: str) -> None:
    """Raises VerificationError naming the first output whose signal-to-noise ratio is below `min_snr` dB."""
    for error in errors:
        if not error.snr_db >= min_snr:
            raise VerificationError(
                f"{who} adds noise at {error.snr_db:.1f} dB to output {error.name!r}, at least {min_snr:g} dB is asked"
            )
