"""Real models and labelled data for benchmarks, prepared from a folder that is not part of the project.

The folder holds models/NAME.onnx and images/ with labels.csv (columns file, class_index), cifar10_test2000.zip
(folders `<index>_<class>`) and mnist/t10k-*.gz. Set GRAPHOPT_SHARED to it; default: `../shared`.
"""

from __future__ import annotations

import csv
import gzip
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SHARED = Path(os.environ.get("GRAPHOPT_SHARED", Path(__file__).resolve().parents[2] / "shared"))


@dataclass(frozen=True)
class Classifier:
    """A classifier, its data and how pictures become inputs."""

    name: str
    data: str
    preprocess: str | None

    @property
    def path(self) -> Path:
        return SHARED / "models" / f"{self.name}.onnx"

    def data_path(self, work: Path) -> Path:
        """Labelled data that `--calib` and `--eval` accept, made below `work` where it must be unpacked."""
        return {"imagenet": lambda: SHARED / "images", "cifar": lambda: _cifar(work), "mnist": lambda: _mnist(work)}[
            self.data
        ]()


CLASSIFIERS = (
    Classifier("squeezenet1_1", "imagenet", "imagenet"),
    Classifier("mobilenetv2", "imagenet", "imagenet"),
    Classifier("mobilenetv1_075", "imagenet", "imagenet-inception"),
    Classifier("tiny_darknet", "imagenet", "unit"),
    Classifier("resnet20_cifar10", "cifar", "cifar10"),
    Classifier("resnet56_cifar10", "cifar", "cifar10"),
    Classifier("mnist_cnn", "mnist", None),
)

OTHERS: dict[str, tuple[str, ...]] = {
    "deeplabv3_mnv2": (),
    "facenet": (),
    "gtcrn": (),
    "magika": (),
    "nanodet_m": ("data:1,3,320,320",),
    "nsnet2": ("features:1,100,161",),
    "stories260k": ("input_ids:1,64",),
    "style_transfer": ("input:1,3,256,256",),
    "super_resolution": (),
    "ultraface_rfb320": (),
    "yolox_nano": (),
}
"""Other models, with `--input` where dimensions other than the batch are dynamic."""


def _cifar(work: Path) -> Path:
    folder = work / "cifar10"
    if not (folder / "labels.csv").is_file():
        with zipfile.ZipFile(SHARED / "images" / "cifar10_test2000.zip") as archive:
            archive.extractall(folder)
        rows = sorted(folder.glob("*/*.jpg"))
        with (folder / "labels.csv").open("w", newline="") as handle:
            writer = csv.writer(handle)
            writer.writerow(["file", "class_index"])
            writer.writerows([str(f.relative_to(folder)), f.parent.name.partition("_")[0]] for f in rows)
    return folder


def _mnist(work: Path) -> Path:
    file = work / "mnist.npz"
    if not file.is_file():
        folder = SHARED / "images" / "mnist"
        pixels = np.frombuffer(gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8, -1, 16)
        labels = np.frombuffer(gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes()), np.uint8, -1, 8)
        np.savez(file, Input3=pixels.reshape(-1, 1, 28, 28).astype(np.float32), labels=labels.astype(np.int64))
    return file
