"""Random networks in which channels meet in every way that pruning has to follow."""

from __future__ import annotations

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

SIZE = 6
"""Height and width of the values between blocks."""


class Network:
    """An ONNX graph under construction. Values are float32 (2, C, 6, 6); random numbers come from `draw`."""

    def __init__(self, draw, opset: int):
        self.draw, self.opset = draw, opset
        self.rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def pick(self, *options):
        return self.draw(st.sampled_from(options))

    def constant(self, array) -> str:
        name = f"c{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def weights(self, *shape: int, fan_in: int = 1) -> str:
        return self.constant((self.rng.standard_normal(shape) * (1.5 / fan_in) ** 0.5).astype(np.float32))

    def ints(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def node(self, op: str, *inputs: str, **attributes) -> str:
        return self.nodes_of(op, *inputs, outputs=1, **attributes)[0]

    def nodes_of(self, op: str, *inputs: str, outputs: int, **attributes) -> list[str]:
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, inputs, names, f"n{len(self.nodes)}", **attributes))
        return names

    # -- single operators, (name, channels) -> (name, channels) --------------------------------------------------------

    def conv(self, x: str, c: int, m: int | None = None, group: int = 1) -> tuple[str, int]:
        m = m or group * self.pick(*range(1 + (group == 1), 7 // min(group, 3) + 1))
        k = self.pick(1, 3)
        bias = [self.weights(m, fan_in=10)] if self.pick(True, False) else []
        w = self.weights(m, c // group, k, k, fan_in=c // group * k * k)
        return self.node("Conv", x, w, *bias, group=group, pads=[k // 2] * 4, kernel_shape=[k, k]), m

    def grouped(self, x: str, c: int) -> tuple[str, int]:
        group = self.pick(*(g for g in (2, 3, 4, 6, c) if c % g == 0), c)
        return self.conv(x, c, group * self.pick(1, 2, 3), group)

    def transposed(self, x: str, c: int) -> tuple[str, int]:
        group = self.pick(*(g for g in (1, 2, 3) if c % g == 0), c)
        m = self.pick(1, 2, 3) * group
        m = m if m > 1 else 2 * group
        w = self.weights(c, m // group, 3, 3, fan_in=c // group * 9)
        return self.node("ConvTranspose", x, w, self.weights(m), group=group, pads=[1] * 4), m

    def activation(self, x: str, c: int) -> tuple[str, int]:
        op = self.pick("Relu", "Sigmoid", "PRelu", "Clip", "Mul", "Add", "BatchNormalization", "InstanceNormalization",
                       "Pow", "LeakyRelu", "Softmax")  # fmt: skip
        shape = self.pick((c, 1, 1), (1, c, 1, 1), (1,), (c, 1, SIZE))
        if op == "BatchNormalization":
            ones = (self.weights(c), self.weights(c), self.weights(c))
            return self.node(op, x, *ones, self.constant(self.rng.uniform(0.5, 2, c).astype(np.float32))), c
        if op == "InstanceNormalization":
            return self.node(op, x, self.weights(c), self.weights(c)), c
        if op == "Clip":
            return self.node(op, x, self.constant(np.float32(-1)), self.constant(np.float32(1.5))), c
        if op == "Pow":
            return self.node(op, x, self.constant(np.float32(2))), c
        if op == "Softmax":
            return self.node(op, x, axis=3), c
        if op in ("Mul", "Add") and self.pick(True, False):
            return self.node(op, self.weights(*shape), x), c
        return self.node(op, x, *([self.weights(*shape)] if op in ("Mul", "Add", "PRelu") else [])), c

    def window(self, x: str, c: int) -> tuple[str, int]:
        if self.pick(True, False):
            return self.node(self.pick("MaxPool", "AveragePool"), x, kernel_shape=[3, 3], pads=[1] * 4), c
        if self.pick(True, False):
            scales = self.constant(np.array([1, 1, 2, 2], np.float32))
            x = self.node("Resize", x, "", scales, mode="nearest")
        else:
            x = self.node("Resize", x, "", "", self.ints(2, c, 2 * SIZE, 2 * SIZE), mode="nearest")
        return self.node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2]), c

    def padded(self, x: str, c: int) -> tuple[str, int]:
        x = self.node("Pad", x, self.ints(0, 0, 1, 1, 0, 0, 1, 1), mode=self.pick("reflect", "constant"))
        return self.node("Conv", x, self.weights(5, c, 3, 3, fan_in=9 * c)), 5

    # -- what couples channels ----------------------------------------------------------------------

    def residual(self, x: str, c: int) -> tuple[str, int]:
        y, _ = self.chain(x, c, 2, last=c)
        return self.node(self.pick("Add", "Sub", "Mul", "Max"), *((x, y) if self.pick(True, False) else (y, x))), c

    def wider(self, x: str, c: int) -> tuple[str, int]:
        """A shortcut that pads channels with zeros, as ResNets for CIFAR do."""
        before, after = self.pick(0, 1, 3), self.pick(1, 2)
        y, m = self.conv(x, c, before + c + after)
        x = self.node("Pad", x, self.ints(0, before, 0, 0, 0, after, 0, 0))
        return self.node("Add", x, y), m

    def branches(self, x: str, c: int) -> tuple[str, int]:
        parts = [(x, c)] if self.pick(True, False) else []
        parts += [self.chain(x, c, self.pick(1, 2)) for _ in range(2)]
        return self.node("Concat", *(name for name, _ in parts), axis=self.pick(1, -3)), sum(m for _, m in parts)

    def parts(self, x: str, c: int) -> tuple[str, int]:
        """Split, change one part, concatenate: the unit of ShuffleNet."""
        cut = self.pick(*range(1, c))
        if self.opset >= 18 and c % 2 == 0 and self.pick(True, False):
            cut, (a, b) = c // 2, self.nodes_of("Split", x, outputs=2, axis=1, num_outputs=2)
        elif c % 2 == 0 and self.opset < 18 and self.pick(True, False):
            cut, (a, b) = c // 2, self.nodes_of("Split", x, outputs=2, axis=1)
        else:
            a, b = self.nodes_of("Split", x, self.ints(cut, c - cut), outputs=2, axis=1)
        b, m = self.chain(b, c - cut, 2)
        return self.node("Concat", a, b, axis=1), cut + m

    def shuffle(self, x: str, c: int) -> tuple[str, int]:
        g = self.pick(*(g for g in (2, 3, 4) if c % g == 0), 1)
        x = self.node("Reshape", x, self.ints(*self.pick((2, g, c // g, SIZE, SIZE), (0, g, -1, SIZE, SIZE))))
        x = self.node("Transpose", x, perm=[0, 2, 1, 3, 4])
        return self.node("Reshape", x, self.ints(*self.pick((2, c, SIZE, SIZE), (0, -1, SIZE, SIZE)))), c

    def picked(self, x: str, c: int) -> tuple[str, int]:
        kind = self.pick("Slice", "Gather", "reverse")
        if kind == "Slice":
            start = self.pick(*range(c - 1))
            stop = self.pick(*range(start + 2, c + 1))
            ends = self.ints(self.pick(stop, stop - c if stop < c else 2**62))
            starts = self.ints(self.pick(start, start - c))
            return self.node("Slice", x, starts, ends, self.ints(self.pick(1, -3))), stop - start
        if kind == "Gather":
            indices = self.rng.permutation(c)[: max(2, c - 1)]
            return self.node("Gather", x, self.constant(indices.astype(np.int64)), axis=1), len(indices)
        return self.node("Gather", x, self.ints(*reversed(range(-c, 0))), axis=1), c

    def squeeze_and_excite(self, x: str, c: int) -> tuple[str, int]:
        if self.pick(True, False):
            s, m = self.conv(self.node("GlobalAveragePool", x), c)
            s, _ = self.conv(self.node("Relu", s), m, c)
        else:
            axes = self.ints(2, 3)
            if self.opset >= 18:
                s = self.node("ReduceMean", x, axes, keepdims=0)
            else:
                s = self.node("ReduceMean", x, axes=[2, 3], keepdims=0)
            s = self.node("Relu", self.node("Gemm", s, self.weights(4, c, fan_in=c), self.weights(4), transB=1))
            s = self.node("Gemm", s, self.weights(4, c, fan_in=4), self.weights(1, c), beta=0.5, alpha=2.0)
            s = self.node("Unsqueeze", s, axes)
        return self.node("Mul", x, self.node("Sigmoid", s)), c

    def spatial_attention(self, x: str, c: int) -> tuple[str, int]:
        """All channels are mixed here: none of them may be cut."""
        op = self.pick("ReduceMean", "ReduceMax")
        if self.opset >= 18:
            mixed = self.node(op, x, self.ints(self.pick(1, -3)))
        else:
            mixed = self.node(op, x, axes=[self.pick(1, -3)])
        return self.node("Mul", x, self.node("Sigmoid", mixed)), c

    def last_axis(self, x: str, c: int) -> tuple[str, int]:
        x = self.node("Transpose", x, perm=[0, 2, 3, 1])
        x = self.node("Add", self.node("MatMul", x, self.weights(c, 6, fan_in=c)), self.weights(6))
        return self.node("Transpose", x, perm=[0, 3, 1, 2]), 6

    def space(self, x: str, c: int) -> tuple[str, int]:
        x = self.node("SpaceToDepth", x, blocksize=2)
        if self.pick(True, False):
            m = self.pick(12, 16)
            x, c = self.node("Conv", x, self.weights(m, 4 * c, 1, 1, fan_in=4 * c)), m // 4
        return self.node("DepthToSpace", x, blocksize=2, mode=self.pick("DCR", "CRD")), c

    def along_space(self, x: str, c: int) -> tuple[str, int]:
        """Concatenated and cut along another axis: the two halves are coupled."""
        y, _ = self.conv(x, c, c)
        both = self.node("Concat", x, y, axis=2)
        return self.node("Slice", both, self.ints(3), self.ints(3 + SIZE), self.ints(2)), c

    # ----------------------------------------------------------------------------------------------------

    def chain(self, x: str, c: int, length: int, last: int | None = None) -> tuple[str, int]:
        for _ in range(length):
            x, c = self.pick(self.conv, self.activation, self.grouped, self.window, self.transposed)(x, c)
        return self.conv(x, c, last) if last else (x, c)

    def head(self, x: str, c: int) -> str:
        kind = self.pick("flatten", "pool", "reshape", "matmul", "conv")
        if kind == "conv":
            return self.node("Conv", x, self.weights(3, c, 1, 1, fan_in=c))
        if kind == "pool":
            x = self.node("Flatten", self.node("GlobalAveragePool", x))
            return self.node("Gemm", x, self.weights(3, c, fan_in=c), self.weights(3), transB=1)
        features = c * SIZE * SIZE
        if kind == "flatten":
            x = self.node("Flatten", x, axis=1)
        else:
            x = self.node("Reshape", x, self.ints(*self.pick((2, features), (0, -1), (-1, features), (2, -1))))
        if kind == "matmul":
            return self.node("Add", self.node("MatMul", x, self.weights(features, 3, fan_in=features)), self.weights(3))
        return self.node("Gemm", x, self.weights(features, 3, fan_in=features))


@st.composite
def networks(draw) -> onnx.ModelProto:
    """A valid model, x f32[2,3,6,6] -> y, of two to six blocks."""
    net = Network(draw, draw(st.sampled_from([13, 17, 18])))
    x, c = net.conv("x", 3, net.pick(4, 6, 8))
    blocks = (net.conv, net.activation, net.grouped, net.transposed, net.window, net.padded, net.residual, net.wider,
              net.branches, net.parts, net.shuffle, net.picked, net.squeeze_and_excite, net.spatial_attention,
              net.last_axis, net.space, net.along_space)  # fmt: skip
    for _ in range(draw(st.integers(2, 6))):
        x, c = net.pick(*blocks)(x, c)
        if c > 24 or c < 2:
            x, c = net.conv(x, c, 4)
    y = net.head(x, c)
    graph = helper.make_graph(
        net.nodes,
        "random",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, SIZE, SIZE])],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, None)],
        net.initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", net.opset)], ir_version=8)
    model = onnx.shape_inference.infer_shapes(model)
    onnx.checker.check_model(model, full_check=True)
    return model
