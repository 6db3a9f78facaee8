"""Compile with images and weights in 16 bits: `--precision bf16` or `--precision fp16`.

    y = round(f(round(x), round(w)))        round: float32 -> bfloat16, nearest even, 8 bits of significand

What it does: next to the float32 candidates, each exact variant is also compiled with images and weights stored as
bfloat16. Products of bfloat16 numbers are exact in float32 and are summed there; bias, activation and residual are
float32 in registers; a value is rounded once, where it is stored. Inputs and outputs of the model stay float32.

float16 has 11 bits of significand, so its noise is 18 dB lower, but ends at 65504: a network whose images exceed that
becomes infinite and is refused as wrong. GPUs sum its products in float32, too. ARM cores compute in float16, twice as
many numbers a vector: convolutions, matrix products with a constant and elementwise chains; sums are cut into runs of
at most 160 terms. Softmax, normalization and means stay float32.

Applies when: bf16: the target has amx_bf16 or avx512_bf16; fp16: it is an ARM core with asimdhp; either: it is a GPU
with tensor cores for the type. Elsewhere it is refused, for emulation would be slower.

Fidelity: lossy. Each stored value has a relative error of at most 2^-8 (2^-11 in float16). With evaluation data the
candidate is judged by its accuracy through the compiled engine (`--max-drop`, or `--min-snr` where outputs are no
classes); without, by the signal-to-noise ratio of every output on the verification samples, at least `--min-snr`. It is
delivered only if it keeps the bound and is faster. Quantized variants are not compiled this way.

Source: Kalamkar et al., A Study of BFLOAT16 for Deep Learning Training, arXiv:1905.12322, 2019; Higham, Accuracy and
Stability of Numerical Algorithms, 2nd edition, section 4.2 (sums in runs).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

from graphopt.errors import SpecError, VerificationError
from graphopt.settings import Precision, Settings
from graphopt.targets.base import Target
from graphopt.verify import OutputError

NARROW = {"bf16": "bfloat16", "fp16": "float16"}
"""What settings, reports and the command line say, and the target's word for it."""


def narrowed(target: Target, precision: str = "bf16") -> Target:
    """The target that compiles in bfloat16 or float16. Raises SpecError for one that has no such option, TargetError
    where the processor lacks the instructions."""
    try:
        found = dataclasses.replace(target, precision=NARROW[precision])  # pyright: ignore[reportCallIssue]
    except (TypeError, ValueError):  # no such field, or not one of its values
        hint = "use --precision float32"
        raise SpecError(f"the target {target.name} has no precision {precision}", hint=hint) from None
    found.check_precision()  # pyright: ignore[reportAttributeAccessIssue]
    return found


def settled(settings: Settings, target: Target) -> tuple[Settings, Target]:
    """`--precision bf16` and `cpu{precision=bf16}` mean the same: float32 stays a candidate, bfloat16 joins it. So does
    float16 with `fp16`.

    Raises SpecError and TargetError as `narrowed` does, and SpecError where only ONNX Runtime is allowed, or where the
    setting and the target say different things.
    """
    word = next((w for w, theirs in NARROW.items() if getattr(target, "precision", None) == theirs), None)
    if word is not None:
        if settings.precision not in ("float32", word):
            raise SpecError(f"--precision {settings.precision} and {target} contradict each other", hint="give one")
        settings = dataclasses.replace(settings, precision=cast(Precision, word))
        target = dataclasses.replace(target, precision="float32")  # pyright: ignore[reportCallIssue]
    if settings.precision in NARROW:
        if settings.engine == "onnxruntime":
            hint = "leave --engine out, or say tvm"
            raise SpecError(f"--precision {settings.precision} needs the compiled engine", hint=hint)
        narrowed(target, settings.precision)
    return settings, target


def check_noise(errors: Sequence[OutputError], min_snr: float, who: str) -> None:
    """Raises VerificationError naming the first output whose signal-to-noise ratio is below `min_snr` dB."""
    for error in errors:
        if not error.snr_db >= min_snr:
            raise VerificationError(
                f"{who} adds noise at {error.snr_db:.1f} dB to output {error.name!r}, at least {min_snr:g} dB is asked"
            )
