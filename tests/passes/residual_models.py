"""Random networks of residual blocks."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

SIZE = 6
"""Height and width of all images."""


class Residual:
    """A chain of blocks under construction: float32 images (N, channels, 6, 6)."""

    def __init__(self, seed: int, channels: int, batch: int | str = "N"):
        self.rng = np.random.default_rng(seed)
        self.channels, self.batch = channels, batch
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.value = "x"

    def constant(self, *shape: int, scale: float = 1.0) -> str:
        name = f"c{len(self.constants)}"
        array = self.rng.standard_normal(shape) * scale
        self.constants.append(numpy_helper.from_array(array.astype(np.float32), name))
        return name

    def node(self, op: str, *inputs: str, name: str | None = None, **attributes) -> str:
        output = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [output], name or f"n{len(self.nodes)}", **attributes))
        return output

    def conv(self, x: str, inputs: int, outputs: int, kernel: int, group: int = 1, name: str | None = None) -> str:
        fan_in = inputs // group * kernel**2
        weights = self.constant(outputs, inputs // group, kernel, kernel, scale=fan_in**-0.5)
        bias = self.constant(outputs, scale=0.2)
        return self.node("Conv", x, weights, bias, name=name, group=group, pads=[kernel // 2] * 4)

    def add(self, branch: str, name: str, swapped: bool = False) -> None:
        pair = (self.value, branch) if swapped else (branch, self.value)
        self.value = self.node("Add", *pair, name=name)

    def basic(self, name: str, kernel: int = 3, activation: str | None = "Relu", wide: int = 1) -> None:
        """Conv, activation, Conv."""
        c = self.channels
        h = self.conv(self.value, c, wide * c, kernel)
        if activation is not None:
            h = self.node(activation, h)
        self.add(self.conv(h, wide * c, c, kernel), name)

    def inverted(self, name: str) -> None:
        """MobileNetV2's and MobileNetV3's: 1x1, depthwise 3x3, squeeze and excite, 1x1."""
        c, w = self.channels, 6 * self.channels
        h = self.node("Relu", self.conv(self.value, c, w, 1))
        h = self.node("Relu", self.conv(h, w, w, 3, group=w))
        scale = self.node("Sigmoid", self.conv(self.node("GlobalAveragePool", h), w, w, 1))
        self.add(self.conv(self.node("Mul", h, scale), w, c, 1), name, swapped=True)

    def relu(self) -> None:
        self.value = self.node("Relu", self.value)

    def model(self, extra: tuple[str, ...] = ()) -> ir.Model:
        """Output `y` of ten classes behind the images' means; further outputs by name."""
        pooled = self.node("Flatten", self.node("GlobalAveragePool", self.value))
        self.nodes.append(helper.make_node("Gemm", [pooled, self.constant(self.channels, 10)], ["y"], "last"))
        images = [self.batch, self.channels, SIZE, SIZE]
        outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [self.batch, 10])]
        outputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, images) for name in extra]
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, images)]
        graph = helper.make_graph(self.nodes, "residual", inputs, outputs, self.constants)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(made, full_check=True)
        return ir.from_proto(made)


@st.composite
def networks(draw) -> ir.Model:
    """One to four blocks `add0`, `add1` ... of different kinds, with and without Relu behind."""
    made = Residual(draw(st.integers(0, 2**30)), draw(st.integers(1, 6)), draw(st.sampled_from(["N", 2])))
    for index in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            made.inverted(f"add{index}")
        else:
            kernel, wide = draw(st.sampled_from([1, 3])), draw(st.integers(1, 3))
            made.basic(f"add{index}", kernel, draw(st.sampled_from(["Relu", "Sigmoid", None])), wide)
        if draw(st.booleans()):
            made.relu()
    return made.model()
