"""What it costs in top-1 to replace residual blocks by one convolution each: every block alone, then many together.

    python benchmarks/merge_blocks.py [--models NAME ...] [--calibrate N] [--evaluate N] [--together N ...]
                                      [--ratios R ...] [--portions P] [--skip-single]

Models and pictures: see `shared_data`. Some samples calibrate (200, or N), others evaluate (all, or N drawn at random).
`expected` is the share of the energy of the block's output that the fit expects to lose. `--together N` merges, by 3x3,
the N blocks that lost the fewest points alone; where `--skip-single`, those that the fit expects to lose least.
`--ratios R` lets the pass choose. Everything runs in ONNX Runtime on this machine.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnx_ir as ir
from shared_data import CLASSIFIERS, Classifier

from graphopt import model as models
from graphopt.accuracy import evaluate
from graphopt.calibration import load_dataset
from graphopt.passes.base import Context
from graphopt.passes.blocks.find import find_blocks
from graphopt.passes.blocks.observe import fit_blocks
from graphopt.passes.layer_macs import layer_macs
from graphopt.passes.merge_blocks import MergeBlocks
from graphopt.pipeline import Pipeline


def compare(which: Classifier, given: argparse.Namespace, folder: Path) -> None:
    source = models.load(which.path)
    signature = models.signature(source)
    data = load_dataset(which.data_path(folder), signature, which.preprocess)
    calibration, evaluation = data.draw(given.calibrate, 0)
    if given.evaluate is not None:
        evaluation, _ = evaluation.draw(min(given.evaluate, len(evaluation)), 1)
    context = Context(data=calibration)
    exact, _ = Pipeline.parse("simplify,fold-batch-norm").run(source, context)

    def top1(model: ir.Model) -> float:
        return evaluate(models.to_bytes(model), evaluation, signature=signature).value

    before = top1(exact)
    print(f"\n{which.name}: top-1 {before:.2f} on {len(evaluation)} pictures, {given.calibrate} calibrate\n")
    ranking = _each(exact, context, before, top1) if not given.skip_single else _expected(exact, context)
    print(
        "\n| merged | blocks by 3x3, 1x1 | MACs left | top-1 | points lost | s |\n|---|---|---|---|---|---|", flush=True
    )
    total = sum(layer_macs(exact).values())
    ways = [(f"best {n}", MergeBlocks(blocks=tuple(ranking[:n]), portions=given.portions)) for n in given.together]
    ways += [(f"ratio {r:g}", MergeBlocks(ratio=r, portions=given.portions)) for r in given.ratios]
    for name, way in ways:
        started = time.perf_counter()
        result = way.run(exact.clone(), context)
        seconds, after = time.perf_counter() - started, top1(result.model)
        left = sum(layer_macs(result.model).values()) / total
        new = [node for node in result.model.graph if node.name and node.name.endswith("_merged")]
        small = sum(node.attributes["kernel_shape"].as_ints()[0] == 1 for node in new)
        row = (name, f"{len(new) - small}, {small}", f"{left:.3f}", f"{after:.2f}", f"{before - after:+.2f}")
        print(f"| {' | '.join(row)} | {seconds:.0f} |", flush=True)


def _each(exact: ir.Model, context: Context, before: float, top1: Callable[[ir.Model], float]) -> list[str]:
    """Prints a row for each block; the 3x3 offers, those that cost least first."""
    blocks, _, total = find_blocks(exact)
    fits = fit_blocks(exact, None, blocks, context)
    shares = {block.name: block.macs / total for block in blocks}
    print("| block | share of MACs | kernel | expected | points lost |\n|---|---|---|---|---|", flush=True)
    lost: dict[str, float] = {}
    for offer in MergeBlocks().offers(exact, context):
        lost[offer.value] = before - top1(offer.build())
        kernel = int(offer.value[-1])
        energy = f"{100 * fits[offer.site, kernel].lost:.2f} %"
        row = (offer.site, f"{shares[offer.site]:.3f}", f"{kernel}x{kernel}", energy, f"{lost[offer.value]:+.2f}")
        print(f"| {' | '.join(row)} |", flush=True)
    return sorted((value for value in lost if value.endswith(":3")), key=lost.__getitem__)


def _expected(exact: ir.Model, context: Context) -> list[str]:
    blocks, _, _ = find_blocks(exact)
    fits = fit_blocks(exact, None, blocks, context)
    names = [block.name for block in blocks if (block.name, 3) in fits]
    return [f"{name}:3" for name in sorted(names, key=lambda name: fits[name, 3].lost)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [which.name for which in CLASSIFIERS]
    parser.add_argument("--models", nargs="+", default=["resnet20_cifar10", "resnet56_cifar10"], choices=names)
    parser.add_argument("--calibrate", type=int, default=200)
    parser.add_argument("--evaluate", type=int, help="evaluate on so many samples instead of all")
    parser.add_argument("--together", nargs="*", type=int, default=[2, 4, 6, 8, 10])
    parser.add_argument("--ratios", nargs="*", type=float, default=[0.1, 0.2, 0.3])
    parser.add_argument("--portions", type=int, default=MergeBlocks.portions)
    parser.add_argument("--skip-single", action="store_true", help="do not measure every block alone")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for which in (c for c in CLASSIFIERS if c.name in given.models):
            compare(which, given, Path(folder))


if __name__ == "__main__":
    sys.exit(main())
