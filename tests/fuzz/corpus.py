"""The models that are changed: one that was trained, and small ones that together hold many operators."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
from onnx import numpy_helper

from tests.conftest import ROOT
from tests.models import small_cnn

_TEXTS = {
    "shapes": """<ir_version: 8, opset_import: ["" : 17]>
      g (float[N, 3, 8] x) => (float[a, b] y, int64[k] s)
      <int64[1] zero = {0}, int64[1] one = {1}, int64 i = {0}, int64[2] ends = {2, 8}, int64[2] starts = {0, 0}>
      { s = Shape(x)  n = Gather<axis = 0>(s, i)  m = Unsqueeze(n, zero)  rest = Constant<value = int64[1] {-1}>()
        to = Concat<axis = 0>(m, rest)  r = Reshape(x, to)  t = Transpose<perm = [1, 0]>(r)
        c = Slice(t, starts, ends)  e = Expand(c, ends)  q = Squeeze(n)  f = Cast<to = 1>(q)
        d = Div(e, f)  w = Identity(d)  y = Dropout(w) }""",
    "attention": """<ir_version: 8, opset_import: ["" : 17]>
      g (float[1, 4, 8] x) => (float[1, 4, 8] y)
      <float[8] scale = {1, 1, 1, 1, 1, 1, 1, 1}, float root = {2.8}, float[1] bias = {0.1}>
      { n = LayerNormalization<axis = -1>(x, scale, scale)  t = Transpose<perm = [0, 2, 1]>(n)
        m = MatMul(n, t)  d = Div(m, root)  p = Softmax<axis = -1>(d)  v = MatMul(p, n)
        e = Erf(v)  a = Add(e, bias)  h = Mul(a, v)  y = Add(h, x) }""",
    "integers": """<ir_version: 8, opset_import: ["" : 17]>
      g (int64[4] x, bool[2] b) => (int64[m] y, int64[4] z, bool[2] n)
      <int64 low = {0}, int64 high = {8}, int64 step = {2}, int64[1] reps = {2}, int64[4] w = {3, 5, 7, 9},
       int64[1] four = {4}, int64[2] two = {0, 1}>
      { r = Range(low, high, step)  a = Add(r, step)  d = Div(w, a)  o = Mod(w, a)  t = Tile(d, reps)
        f = ConstantOfShape<value = int64[1] {5}>(four)  e = Mul(f, o)  z = Max(e, x)  c = CumSum(x, low)
        h = OneHot(c, high, two)  y = Concat<axis = 0>(t, c)  n = Not(b) }""",
    "pooling": """<ir_version: 8, opset_import: ["" : 17]>
      g (float[1, 4, 9, 9] x) => (float[a, b, c, d] y)
      <int64[4] ws = {4, 2, 3, 3}, float[4] sc = {1, 1, 2, 2}, float low = {0}, float high = {6},
       int64[2] parts = {1, 1}, int64[8] pads = {0, 0, 1, 1, 0, 0, 1, 1}>
      { w = ConstantOfShape<value = float[1] {0.5}>(ws)
        a = MaxPool<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]>(x)
        b = AveragePool<kernel_shape = [2, 2], count_include_pad = 1>(a)  c = Pad(b, pads)
        e = ConvTranspose<kernel_shape = [3, 3], strides = [2, 2], output_padding = [1, 1]>(c, w)
        f = Clip(e, low, high)  h, i = Split<axis = 1>(f, parts)  j = Sum(h, i)  l = LeakyRelu<alpha = 0.1>(j)
        k = DepthToSpace<blocksize = 2>(a)  y = Resize<mode = "nearest">(l, , sc) }""",
    "reductions": """<ir_version: 8, opset_import: ["" : 17]>
      g (float[2, 3, 4] x) => (float[a] y, int64[p, q] z)
      <int64[1] axes = {1}, int64[1] k = {2}, int64[2, 1] at = {0, 1}, float[2, 4] upd = {1, 2, 3, 4, 5, 6, 7, 8}>
      { s = ReduceSum<keepdims = 0>(x, axes)  m = ReduceMean<axes = [1], keepdims = 0>(x)  a = Sub(s, m)
        p = Pow(a, a)  q = Sqrt(p)  c = Greater(q, m)  w = Where(c, q, m)  u = ScatterND(w, at, upd)
        v, i = TopK<axis = 1>(u, k)  z = NonZero(v)  f = Flatten(v)  t = Tanh(f)
        g2 = GatherND(u, at)  e = Einsum<equation = "ij,kj->ik">(g2, g2)
        y = ReduceL2<axes = [1], keepdims = 0>(e) }""",
    "int8": """<ir_version: 8, opset_import: ["" : 17]>
      g (float[1, 3, 6, 6] x) => (float[1, 4] y)
      <float s = {0.02}, uint8 z = {128}, float[4] ws = {0.01, 0.02, 0.01, 0.03}, int8[4] wz = {0, 0, 0, 0},
       int32[4] bias = {1, 2, 3, 4}, float wscale = {0.02}, int8 wzero = {0}>
      { q = QuantizeLinear(x, s, z)  d = DequantizeLinear(q, s, z)  w = DequantizeLinear<axis = 0>(wq, ws, wz)
        c = Conv<kernel_shape = [3, 3]>(d, w)  r = Relu(c)  q2 = QuantizeLinear(r, s, z)
        d2 = DequantizeLinear(q2, s, z)
        p = GlobalAveragePool(d2)  f = Flatten(p)  q3 = QuantizeLinear(f, s, z)
        m = QLinearMatMul(q3, s, z, mq, wscale, wzero, s, z)  y = DequantizeLinear(m, s, z) }""",
    "branches": """<ir_version: 8, opset_import: ["" : 17]>
      g (float[3] x, bool c) => (float[3] y, float[3] l)
      <int64 count = {3}, bool go = {1}, float[3] w = {1, 2, 3}>
      { y = If (c) <then_branch = t () => (float[3] a) { a = Add(x, w) },
                    else_branch = e () => (float[3] b) { b = Mul(x, w) }>
        l = Loop (count, go, x) <body = body (int64 i, bool k, float[3] s) => (bool o, float[3] n)
              { o = Identity(k)  n = Add(s, w) }> }""",
    "function": """<ir_version: 8, opset_import: ["" : 17, "local" : 1]>
      g (float[2, 4] x) => (float[2, 4] y) { a = local.twice <alpha = 0.5> (x)  y = local.twice <alpha = 0.1> (a) }
      <opset_import: ["" : 17], domain: "local">
      twice <alpha> (v) => (w) { l = LeakyRelu <alpha : float = @alpha> (v)  w = Add(l, l) }""",
    "recurrent": """<ir_version: 8, opset_import: ["" : 17]>
      g (float[5, 1, 4] x) => (float[5, 1, 1, 4] y, float[1, 1, 4] h)
      <int64[3] ws = {1, 16, 4}, int64[2] bs = {1, 32}, int64[3] gs = {1, 12, 4}>
      { w = ConstantOfShape<value = float[1] {0.1}>(ws)  b = ConstantOfShape<value = float[1] {0.2}>(bs)
        v = ConstantOfShape<value = float[1] {0.3}>(gs)  l, h, c = LSTM<hidden_size = 4>(x, w, w, b)
        one = Constant<value = int64[1] {1}>()  s = Squeeze(l, one)
        y = GRU<hidden_size = 4, linear_before_reset = 1>(s, v, v) }""",
    "types": """<ir_version: 9, opset_import: ["" : 19, "com.microsoft" : 1]>
      g (float[2, 4] x) => (float[2, 4] y, double[2, 4] d, string[1] t)
      <float16[4] h = {1, 2, 3, 4}, bfloat16[4] b = {1, 2, 3, 4}, double[4] w = {1, 2, 3, 4}, uint8[4] u = {1, 2, 3, 4},
       string[1] words = {"hello"}>
      { a = Cast<to = 1>(h)  e = Cast<to = 1>(b)  f = Cast<to = 1>(u)  s = Sum(a, e, f)  p = Mul(x, s)
        y = com.microsoft.Gelu(p)  c = Cast<to = 11>(p)  d = Mul(c, w)  t = Identity(words) }""",
}  # fmt: skip


@cache
def corpus() -> dict[str, bytes]:
    """Serialised models by name, all of them valid."""
    found = {"digits": (ROOT / "examples" / "digits" / "digits.onnx").read_bytes()}
    models = {name: onnx.parser.parse_model(text) for name, text in _TEXTS.items()}
    rng = np.random.default_rng(0)
    for name, shape in (("wq", (4, 3, 3, 3)), ("mq", (4, 4))):
        weights = rng.integers(-99, 99, shape, dtype=np.int8)
        models["int8"].graph.initializer.append(numpy_helper.from_array(weights, name))
    for name, model in {"cnn": small_cnn(channels=4), **models}.items():
        found[name] = model.SerializeToString()
    return found
