"""Train the demo model, a small residual CNN on scikit-learn's digits, in plain numpy; export it to ONNX.

    python examples/digits/train.py [FOLDER]      # default: the folder of this file

Writes digits.onnx, calib.npz (200 training pictures) and eval.npz (the held-out pictures with labels). Takes about a
minute on one core. Everything is seeded and single-threaded: a second run on the same machine writes the same bytes.
Needs numpy, onnx and scikit-learn.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SEED = 7
HELD_OUT = 360
CALIBRATION = 200
EPOCHS = 20
BATCH = 64
PEAK_RATE = 0.2
MOMENTUM = 0.9
DECAY = 5e-4
EPSILON = 1e-5
WIDTH = 48
CLASSES = 10


def load_data() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Training and held-out pictures, float32 (n, 1, 16, 16) in 0..1, and int64 labels (n,).

    The 8x8 pictures are enlarged to 16x16 by repeating pixels. The split is drawn once, seeded.
    """
    from sklearn.datasets import load_digits

    rows, target = load_digits(return_X_y=True)
    pictures = (np.asarray(rows).reshape(-1, 1, 8, 8) / 16.0).astype(np.float32)
    pictures = np.kron(pictures, np.ones((1, 1, 2, 2), np.float32))
    labels = np.asarray(target).astype(np.int64)
    order = np.random.default_rng(SEED).permutation(len(labels))
    held_out, training = order[:HELD_OUT], order[HELD_OUT:]
    return pictures[training], labels[training], pictures[held_out], labels[held_out]


@dataclass
class Parameter:
    """A trained array with its gradient and velocity."""

    value: np.ndarray
    decays: bool = True
    gradient: np.ndarray = field(init=False)
    velocity: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.value = self.value.astype(np.float32)
        self.gradient = np.zeros_like(self.value)
        self.velocity = np.zeros_like(self.value)

    def step(self, rate: float) -> None:
        slope = self.gradient + DECAY * self.value if self.decays else self.gradient
        self.velocity = (MOMENTUM * self.velocity - rate * slope).astype(np.float32)
        self.value += self.velocity


class ConvNorm:
    """3x3 convolution with padding 1, then batch normalization, then optionally ReLU. Arrays are (n, h, w, c)."""

    def __init__(self, rng: np.random.Generator, inputs: int, outputs: int, stride: int = 1, relu: bool = True):
        fan_in = 9 * inputs
        self.weight = Parameter(rng.standard_normal((fan_in, outputs)) * np.sqrt(2 / fan_in))  # rows: c, kh, kw
        self.scale = Parameter(np.ones(outputs), decays=False)
        self.bias = Parameter(np.zeros(outputs), decays=False)
        self.mean, self.variance = np.zeros(outputs, np.float32), np.ones(outputs, np.float32)
        self.stride, self.relu = stride, relu

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        return self.weight, self.scale, self.bias

    def forward(self, x: np.ndarray) -> np.ndarray:
        self.input_shape = x.shape
        padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))  # type: ignore[call-overload]
        windows = windows[:, :: self.stride, :: self.stride]
        self.grid = windows.shape[:3]
        self.columns = windows.reshape(-1, self.weight.value.shape[0])
        y = self.columns @ self.weight.value
        mean, variance = y.mean(axis=0), y.var(axis=0)
        self.mean += 0.1 * (mean - self.mean)
        self.variance += 0.1 * (variance - self.variance)
        self.spread = np.sqrt(variance + EPSILON)
        self.normal = (y - mean) / self.spread
        y = self.normal * self.scale.value + self.bias.value
        self.active = y > 0 if self.relu else None
        y = np.maximum(y, 0) if self.relu else y
        return y.reshape(*self.grid, -1)

    def backward(self, slope: np.ndarray) -> np.ndarray:
        slope = slope.reshape(self.normal.shape)
        if self.active is not None:
            slope = slope * self.active
        self.scale.gradient = (slope * self.normal).sum(axis=0)
        self.bias.gradient = slope.sum(axis=0)
        count = len(slope)
        slope = (
            self.scale.value
            / self.spread
            * (slope - self.bias.gradient / count - self.normal * (self.scale.gradient / count))
        )
        self.weight.gradient = self.columns.T @ slope
        windows = (slope @ self.weight.value.T).reshape(*self.grid, -1, 3, 3)
        n, height, width, channels = self.input_shape
        back = np.zeros((n, height + 2, width + 2, channels), np.float32)
        s = self.stride
        for i in range(3):
            for j in range(3):
                back[:, i : i + s * self.grid[1] : s, j : j + s * self.grid[2] : s] += windows[..., i, j]
        return back[:, 1:-1, 1:-1]


class Network:
    """conv - (conv - conv + residual) - conv, stride 2 - average pool - linear."""

    def __init__(self, seed: int = SEED, width: int = WIDTH) -> None:
        rng = np.random.default_rng(seed)
        self.stem = ConvNorm(rng, 1, width)
        self.first = ConvNorm(rng, width, width)
        self.second = ConvNorm(rng, width, width, relu=False)
        self.reduce = ConvNorm(rng, width, 2 * width, stride=2)
        self.weight = Parameter(rng.standard_normal((2 * width, CLASSES)) / np.sqrt(2 * width))
        self.bias = Parameter(np.zeros(CLASSES), decays=False)

    @property
    def layers(self) -> dict[str, ConvNorm]:
        return {"stem": self.stem, "first": self.first, "second": self.second, "reduce": self.reduce}

    @property
    def parameters(self) -> list[Parameter]:
        return [p for layer in self.layers.values() for p in layer.parameters] + [self.weight, self.bias]

    def train_step(self, pictures: np.ndarray, labels: np.ndarray, rate: float) -> float:
        """One step of stochastic gradient descent; returns the mean cross-entropy."""
        stem = self.stem.forward(pictures.transpose(0, 2, 3, 1))
        total = stem + self.second.forward(self.first.forward(stem))
        joined = np.maximum(total, 0)
        features = self.reduce.forward(joined)
        pooled = features.mean(axis=(1, 2))
        logits = pooled @ self.weight.value + self.bias.value
        logits = logits - logits.max(axis=1, keepdims=True)
        chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        rows = np.arange(len(labels))
        loss = float(-np.log(chances[rows, labels] + 1e-12).mean())

        slope = chances
        slope[rows, labels] -= 1
        slope /= len(labels)
        self.weight.gradient = pooled.T @ slope
        self.bias.gradient = slope.sum(axis=0)
        slope = (slope @ self.weight.value.T)[:, None, None] / (features.shape[1] * features.shape[2])
        slope = self.reduce.backward(np.broadcast_to(slope, features.shape)) * (total > 0)
        self.stem.backward(slope + self.first.backward(self.second.backward(slope)))
        for parameter in self.parameters:
            parameter.step(rate)
        return loss


def shifted(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Each picture moved by up to one pixel (half of one of the original's) in each direction, zeros moving in."""
    padded = np.pad(pictures, ((0, 0), (0, 0), (1, 1), (1, 1)))
    size = pictures.shape[2]
    moves = rng.integers(0, 3, (len(pictures), 2))
    return np.stack([p[:, y : y + size, x : x + size] for p, (y, x) in zip(padded, moves, strict=True)])


def train(pictures: np.ndarray, labels: np.ndarray, epochs: int = EPOCHS, log=None) -> Network:
    """Train from SEED. `log` is called with a line after each epoch."""
    network, rng = Network(), np.random.default_rng(SEED + 1)
    steps = epochs * (len(labels) // BATCH)
    done = 0
    for epoch in range(epochs):
        order = rng.permutation(len(labels))
        losses = []
        for first in range(0, len(order) - BATCH + 1, BATCH):
            rate = PEAK_RATE * min(1, (done + 1) / 40) * 0.5 * (1 + np.cos(np.pi * done / steps))
            chosen = order[first : first + BATCH]
            losses.append(network.train_step(shifted(pictures[chosen], rng), labels[chosen], float(rate)))
            done += 1
        if log is not None:
            log(f"epoch {epoch + 1:2d} of {epochs}: loss {np.mean(losses):.4f}")
    return network


def export(network: Network) -> onnx.ModelProto:
    """The network as ONNX, opset 17: `image` float32 [N,1,16,16] -> `logits` float32 [N,10]; BatchNorm kept apart."""
    nodes, tensors = [], []

    def tensor(name: str, array: np.ndarray) -> str:
        tensors.append(numpy_helper.from_array(np.ascontiguousarray(array, np.float32), name))
        return name

    def conv_norm(name: str, source: str) -> str:
        layer = network.layers[name]
        outputs = layer.scale.value.size
        weight = tensor(f"{name}.weight", layer.weight.value.T.reshape(outputs, -1, 3, 3))
        strides = [layer.stride, layer.stride]
        nodes.append(
            helper.make_node(
                "Conv", [source, weight], [f"{name}.conv"], f"{name}/Conv",
                kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=strides,
            )
        )  # fmt: skip
        norm = [
            tensor(f"{name}.scale", layer.scale.value),
            tensor(f"{name}.bias", layer.bias.value),
            tensor(f"{name}.mean", layer.mean),
            tensor(f"{name}.variance", layer.variance),
        ]
        nodes.append(
            helper.make_node(
                "BatchNormalization", [f"{name}.conv", *norm], [f"{name}.norm"], f"{name}/BatchNorm", epsilon=EPSILON
            )
        )
        return relu(name, f"{name}.norm") if layer.relu else f"{name}.norm"

    def relu(name: str, source: str) -> str:
        nodes.append(helper.make_node("Relu", [source], [f"{name}.relu"], f"{name}/Relu"))
        return f"{name}.relu"

    stem = conv_norm("stem", "image")
    branch = conv_norm("second", conv_norm("first", stem))
    nodes.append(helper.make_node("Add", [stem, branch], ["residual.sum"], "residual/Add"))
    features = conv_norm("reduce", relu("residual", "residual.sum"))
    nodes.append(helper.make_node("GlobalAveragePool", [features], ["pool.mean"], "pool/GlobalAveragePool"))
    nodes.append(helper.make_node("Flatten", ["pool.mean"], ["pool.flat"], "pool/Flatten", axis=1))
    head = [tensor("head.weight", network.weight.value.T), tensor("head.bias", network.bias.value)]
    nodes.append(helper.make_node("Gemm", ["pool.flat", *head], ["logits"], "head/Gemm", transB=1))
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 16, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", CLASSES])],
        tensors,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], producer_name="graphopt-digits")
    model.ir_version = 8
    onnx.checker.check_model(model, full_check=True)
    return model


def main(folder: Path) -> None:
    from threadpoolctl import threadpool_limits  # scikit-learn brings it

    pictures, labels, held_out, held_out_labels = load_data()
    with threadpool_limits(1):  # sums in one order, however many cores there are
        network = train(pictures, labels, log=lambda line: sys.stderr.write(line + "\n"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "digits.onnx").write_bytes(export(network).SerializeToString(deterministic=True))
    # Training order is the seeded permutation's, so the first pictures are a random draw.
    np.savez_compressed(folder / "calib.npz", image=pictures[:CALIBRATION])
    np.savez_compressed(folder / "eval.npz", image=held_out, labels=held_out_labels)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)
