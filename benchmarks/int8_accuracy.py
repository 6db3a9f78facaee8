"""What INT8 costs in top-1: float, ONNX Runtime's own quantizer, quantize-int8 alone, and with layers in float.

    python benchmarks/int8_accuracy.py [--models NAME ...] [--draws N ...] [--max-drop 1.0] [--passes SPEC]

Models and pictures: see `shared_data`. Each draw takes 200 samples to calibrate with and evaluates on all others; the
draw named `peers` is numpy.random.RandomState(0).permutation, with which other quantizers were measured. Everything
runs in ONNX Runtime on this machine.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx_ir as ir
from shared_data import CLASSIFIERS, Classifier

from graphopt import model as models
from graphopt.accuracy import evaluate
from graphopt.calibration import Dataset, load_dataset
from graphopt.passes.base import Context
from graphopt.pipeline import Pipeline
from graphopt.recovery import quantized_layers, rank_layers, recover

CALIBRATION_SAMPLES = 200


def split(data: Dataset, draw: str) -> tuple[Dataset, Dataset]:
    """Calibration and evaluation parts."""
    if draw != "peers":
        return data.draw(CALIBRATION_SAMPLES, int(draw))
    order = np.random.RandomState(0).permutation(len(data))
    return data.subset(np.sort(order[:CALIBRATION_SAMPLES])), data.subset(np.sort(order[CALIBRATION_SAMPLES:]))


def quantize_with_onnxruntime(model: ir.Model, calibration: Dataset, folder: Path) -> bytes | None:
    """ONNX Runtime's quantize_static, min-max, a channel, U8S8, Q/DQ; None where it fails or writes a bad model."""
    import onnxruntime
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):
        def __init__(self):
            self.feeds = calibration.batches(1)

        def get_next(self):
            return next(self.feeds, None)

    logging.getLogger().setLevel(logging.ERROR)
    source, result = folder / "float.onnx", folder / "theirs.onnx"
    models.save(model, source)
    try:
        quantization.quantize_static(
            source,
            result,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        onnxruntime.InferenceSession(str(result), providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001 - a peer's failure is a result
        print(f"    ONNX Runtime's quantizer: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
        return None
    return result.read_bytes()


def compare(which: Classifier, draw: str, lossy: str, max_drop: float, peers: bool, folder: Path) -> None:
    source = models.load(which.path)
    signature = models.signature(source)
    calibration, evaluation = split(load_dataset(which.data_path(folder), signature, which.preprocess), draw)
    context = Context(data=calibration)
    exact, _ = Pipeline.parse("simplify,fold-batch-norm").run(source, context)

    def top1(model: bytes) -> float:
        return evaluate(model, evaluation, signature=signature).value

    def build(excluded: tuple[str, ...]) -> ir.Model:
        return Pipeline.parse(lossy).excluding(excluded).run(exact, context)[0]

    float_top1 = top1(models.to_bytes(source))
    theirs = quantize_with_onnxruntime(exact, calibration, folder) if peers else None
    started = time.perf_counter()
    plain = build(())
    seconds = time.perf_counter() - started
    plain_drop = float_top1 - top1(models.to_bytes(plain))
    started = time.perf_counter()
    returned, drop, met = (), plain_drop, plain_drop <= max_drop
    if not met:
        ranked = rank_layers(build, quantized_layers(plain), exact, calibration)
        found = recover(build, ranked, lambda model: float_top1 - top1(models.to_bytes(model)), max_drop)
        returned, drop, met = found.excluded, found.drop, found.met
    print(
        f"| {which.name} | {draw} | {float_top1:.3f} | "
        f"{'-' if theirs is None else f'{float_top1 - top1(theirs):.3f}'} | {plain_drop:.3f} | {seconds:.0f} | "
        f"{drop:.3f}{'' if met else ' (bound missed)'} | {time.perf_counter() - started:.0f} | "
        f"{', '.join(f'{r.node} {r.snr_db:.1f} dB' for r in returned) or 'none'} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [which.name for which in CLASSIFIERS]
    parser.add_argument("--models", nargs="+", default=names, choices=names)
    parser.add_argument("--draws", nargs="+", default=["peers", "0"])
    parser.add_argument("--max-drop", type=float, default=1.0)
    parser.add_argument("--passes", default="quantize-int8", help="the lossy part of the pipeline")
    parser.add_argument("--no-peers", action="store_true", help="do not run ONNX Runtime's quantizer")
    given = parser.parse_args()
    columns = "model", "draw", "float top-1", "ORT quantizer", "quantize-int8", "s", "within bound", "s", "returned"
    print(f"| {' | '.join(columns)} |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for which in (c for c in CLASSIFIERS if c.name in given.models):
            for draw in given.draws:
                compare(which, draw, given.passes, given.max_drop, not given.no_peers, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
