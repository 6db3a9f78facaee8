"""RNN, GRU and LSTM over short sequences of known length, as the ONNX nodes of all their steps.

    all steps at once        A = X W^T + b                       one product of (steps * batch) rows
    one step after another   h_t = cell(A_t, h_(t-1) R^T, ...)   one product of `batch` rows each

Applies when: at most `MOST_STEPS` steps, counted over both directions; activations Sigmoid, Tanh and Relu; all
sequences of a batch of one length. Each step's kernels are the same, so they are compiled and tuned once.
Reference: the equations of ONNX's operator documentation.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

MOST_STEPS = 128
OPSET = 17
"""Of the nodes that are made."""
_GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
_DEFAULTS = {"RNN": ("Tanh",), "GRU": ("Sigmoid", "Tanh"), "LSTM": ("Sigmoid", "Tanh", "Tanh")}
_KNOWN = ("Sigmoid", "Tanh", "Relu")


def refusal(node: onnx.NodeProto, shapes: Sequence[tuple[int, ...] | None], lengths: np.ndarray | None) -> str | None:
    """Why a node is not unrolled; None where it is. `lengths`: the constant operand sequence_lens, if it is one."""
    attributes = _attributes(node)
    if shapes[0] is None or shapes[1] is None:
        return "the shape of its input is not known"
    steps = shapes[0][1 if attributes.get("layout", 0) else 0]
    if not 0 < steps * shapes[1][0] <= MOST_STEPS:
        return f"{steps} steps; up to {MOST_STEPS} are unrolled"
    if len(node.input) > 4 and node.input[4] and (lengths is None or np.any(lengths != steps)):
        return "sequences of different lengths in one batch"
    odd = [name for name in _activations(node, shapes[1][0]) if name not in _KNOWN]
    if odd:
        return f"activation {odd[0]}"
    return None


def unrolled(node: onnx.NodeProto, shapes: Sequence[tuple[int, ...] | None]) -> onnx.GraphProto:
    """The node's steps as a graph whose inputs and outputs have the node's names; opset `OPSET`."""
    x_shape, w_shape = shapes[0], shapes[1]
    assert x_shape is not None and w_shape is not None
    attributes = _attributes(node)
    layout = int(attributes.get("layout", 0))
    w = _Writer()
    names = [*node.input, *[""] * (8 - len(node.input))]
    x, weights, recurrent, bias, _, first_h, first_c, peepholes = names
    steps, batch = (x_shape[1], x_shape[0]) if layout else x_shape[:2]
    hidden, directions = w_shape[1] // _GATES[node.op_type], w_shape[0]
    if layout:
        x = w.add("Transpose", [x], perm=[1, 0, 2])
        first_h, first_c = (w.add("Transpose", [each], perm=[1, 0, 2]) if each else "" for each in (first_h, first_c))
    activations = _activations(node, directions)
    ways = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}
    outputs, last_h, last_c = [], [], []
    each = len(_DEFAULTS[node.op_type])
    for index, backward in enumerate(ways[str(attributes.get("direction", "forward"))]):
        cell = _Cell(w, node, hidden, activations[index * each : (index + 1) * each])
        made = cell.run(
            x,
            (steps, batch, x_shape[2]),
            w.row(weights, index),
            w.row(recurrent, index),
            w.row(bias, index) if bias else "",
            w.row(peepholes, index) if peepholes else "",
            w.row(first_h, index) if first_h else w.constant(np.zeros((batch, hidden), np.float32), like=x),
            w.row(first_c, index) if first_c else w.constant(np.zeros((batch, hidden), np.float32), like=x),
            backward,
        )
        outputs.append(made[0])
        last_h.append(made[1])
        last_c.append(made[2])
    # Each direction's outputs: (steps, 1, batch, hidden); together (steps, directions, batch, hidden).
    whole = w.add("Concat", outputs, axis=1) if directions > 1 else outputs[0]
    ends = []
    for states in (last_h, last_c):
        stacked = [w.unsqueezed(state, 0) for state in states if state]
        ends.append(w.add("Concat", stacked, axis=0) if len(stacked) > 1 else stacked[0] if stacked else "")
    if layout:
        whole = w.add("Transpose", [whole], perm=[2, 0, 1, 3])
        ends = [w.add("Transpose", [end], perm=[1, 0, 2]) if end else "" for end in ends]
    for name, made in zip(node.output, [whole, *ends], strict=False):
        if name:
            w.nodes.append(helper.make_node("Identity", [made], [name]))
    empty = helper.make_empty_tensor_value_info
    wanted = [empty(name) for name in node.output if name]
    return helper.make_graph(w.nodes, node.name or "steps", [], wanted, w.constants)


class _Writer:
    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self._numbers = count()

    def add(self, op_type: str, inputs: Sequence[str], outputs: int = 1, **attributes: Any) -> Any:
        """A node; the name of its output, or a list of them."""
        names = [f"step/{op_type}_{next(self._numbers)}" for _ in range(outputs)]
        self.nodes.append(helper.make_node(op_type, list(inputs), names, name=names[0], **attributes))
        return names[0] if outputs == 1 else names

    def constant(self, array: Any, like: str = "") -> str:
        """A constant; `like`: cast to the element type of that value."""
        name = f"step/constant_{next(self._numbers)}"
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return self.add("CastLike", [name, like]) if like else name

    def integers(self, *values: int) -> str:
        return self.constant(np.array(values, np.int64))

    def unsqueezed(self, value: str, axis: int) -> str:
        return self.add("Unsqueeze", [value, self.integers(axis)])

    def row(self, value: str, index: int, axis: int = 0) -> str:
        """value[index] along an axis, which goes."""
        cut = self.add("Slice", [value, *(self.integers(i) for i in (index, index + 1, axis))])
        return self.add("Squeeze", [cut, self.integers(axis)])

    def parts(self, value: str, count: int, axis: int) -> list[str]:
        made = self.add("Split", [value], count, axis=axis)
        return [made] if count == 1 else made


class _Cell:
    """One direction of a node."""

    def __init__(self, w: _Writer, node: onnx.NodeProto, hidden: int, activations: Sequence[str]):
        attributes = _attributes(node)
        self.w, self.kind, self.hidden, self.activations = w, node.op_type, hidden, activations
        self.clip = float(attributes.get("clip", 0.0))
        self.after = bool(attributes.get("linear_before_reset", 0))
        self.coupled = bool(attributes.get("input_forget", 0))

    def run(self, x, sizes, weights, recurrent, bias, peepholes, h, c, backward) -> tuple[str, str, str]:
        """Outputs (steps, 1, batch, hidden), the last h and the last c, or ''."""
        w, (steps, batch, width) = self.w, sizes
        gates = _GATES[self.kind]
        flat = w.add("Reshape", [x, w.integers(steps * batch, width)])
        inner = w.add("MatMul", [flat, w.add("Transpose", [weights], perm=[1, 0])])
        hidden_bias = ""
        if bias:
            input_bias, hidden_bias = w.parts(bias, 2, 0)
            if self.kind != "GRU":  # nothing happens between the two products
                input_bias, hidden_bias = w.add("Add", [input_bias, hidden_bias]), ""
            inner = w.add("Add", [inner, input_bias])
        inner = w.add("Reshape", [inner, w.integers(steps, batch, gates * self.hidden)])
        turned = w.add("Transpose", [recurrent], perm=[1, 0])
        self.peepholes = w.parts(peepholes, 3, 0) if peepholes else []
        made: list[str] = [""] * steps
        for step in reversed(range(steps)) if backward else range(steps):
            a = w.row(inner, step)
            if self.kind == "RNN":
                h = self._act(0, w.add("Add", [a, w.add("MatMul", [h, turned])]))
            elif self.kind == "GRU":
                h = self._gru(a, h, turned, hidden_bias)
            else:
                h, c = self._lstm(a, h, c, turned)
            made[step] = w.add("Unsqueeze", [h, w.integers(0, 1)])
        whole = w.add("Concat", made, axis=0) if steps > 1 else made[0]
        return whole, h, c if self.kind == "LSTM" else ""

    def _act(self, index: int, value: str) -> str:
        if self.clip:
            bounds = [self.w.constant(np.float32(bound), like=value) for bound in (-self.clip, self.clip)]
            value = self.w.add("Clip", [value, *bounds])
        return self.w.add(self.activations[index], [value])

    def _gru(self, a: str, h: str, turned: str, bias: str) -> str:
        w = self.w
        az, ar, ah = w.parts(a, 3, 1)
        if self.after:
            product = w.add("MatMul", [h, turned])
            if bias:
                product = w.add("Add", [product, bias])
            pz, pr, ph = w.parts(product, 3, 1)
        else:
            of_gates, of_state = w.add("Split", [turned, w.integers(2 * self.hidden, self.hidden)], 2, axis=1)
            both, last = w.add("Split", [bias, w.integers(2 * self.hidden, self.hidden)], 2, axis=0) if bias else "  "
            product = w.add("MatMul", [h, of_gates])
            if bias:
                product = w.add("Add", [product, both])
            pz, pr = w.parts(product, 2, 1)
        z = self._act(0, w.add("Add", [az, pz]))
        r = self._act(0, w.add("Add", [ar, pr]))
        if self.after:
            inner = w.add("Mul", [r, ph])
        else:
            inner = w.add("MatMul", [w.add("Mul", [r, h]), of_state])
            if bias:
                inner = w.add("Add", [inner, last])
        new = self._act(1, w.add("Add", [ah, inner]))
        # (1 - z) new + z h
        return w.add("Add", [new, w.add("Mul", [z, w.add("Sub", [h, new])])])

    def _lstm(self, a: str, h: str, c: str, turned: str) -> tuple[str, str]:
        w = self.w
        i, o, f, g = w.parts(w.add("Add", [a, w.add("MatMul", [h, turned])]), 4, 1)
        if self.peepholes:
            i = w.add("Add", [i, w.add("Mul", [self.peepholes[0], c])])
            f = w.add("Add", [f, w.add("Mul", [self.peepholes[2], c])])
        i, g = self._act(0, i), self._act(1, g)
        f = w.add("Sub", [w.constant(np.float32(1), like=i), i]) if self.coupled else self._act(0, f)
        c = w.add("Add", [w.add("Mul", [f, c]), w.add("Mul", [i, g])])
        if self.peepholes:
            o = w.add("Add", [o, w.add("Mul", [self.peepholes[1], c])])
        return w.add("Mul", [self._act(0, o), w.add(self.activations[2], [c])]), c


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    found = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return {name: value.decode() if isinstance(value, bytes) else value for name, value in found.items()}


def _activations(node: onnx.NodeProto, directions: int) -> list[str]:
    given = _attributes(node).get("activations")
    return [name.decode() for name in given] if given else list(_DEFAULTS[node.op_type]) * directions
