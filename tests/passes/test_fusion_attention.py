"""RotaryEmbedding and Attention: layouts, groups of heads, masks, scales; and what only looks so."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt import graph as g
from graphopt import model as models
from graphopt.passes.base import Context
from graphopt.passes.simplify import Simplify
from tests.passes.fusing import Writing, fuse, operators


def last(shape_rank: int, w: Writing, value: str, part: int, pairs: int, how: str) -> str:
    """The first or second half of the last axis; of an axis of two, with that axis dropped."""
    if how == "gather":
        return w.call("Gather", value, np.array(part, np.int64), axis=-1)
    size = 1 if how == "squeeze" else pairs
    cut = w.call("Slice", value, np.array([part * size]), np.array([(part + 1) * size]), np.array([shape_rank - 1]))
    return w.call("Squeeze", cut, np.array([shape_rank - 1])) if how == "squeeze" else cut


def rotated(
    w: Writing, x: str, heads: int, pairs: int, first: bool, interleaved: bool, how: str, tables, order=0
) -> str:
    """`x` (N, S, H, D), or (N, H, S, D) unless `first`, turned by `tables`."""
    c, s = tables
    rank = 4
    if interleaved:
        x, rank = (
            w.call("Reshape", x, np.array([0, 0, heads if first else 0, pairs, 2] if first else [0, 0, 0, pairs, 2])),
            5,
        )
    one, two = (last(rank, w, x, k, pairs, how if interleaved else "slice") for k in (0, 1))
    pair = (lambda a, b: w.call("Mul", b, a)) if order else (lambda a, b: w.call("Mul", a, b))
    real = w.call("Sub", pair(one, c), pair(two, s))
    parts = [pair(one, s), pair(two, c)]
    imaginary = w.call("Add", *(parts[::-1] if order else parts))
    if not interleaved:
        return w.call("Concat", real, imaginary, axis=-1)
    joined = w.call("Concat", *(w.call("Unsqueeze", v, np.array([4])) for v in (real, imaginary)), axis=4)
    return w.call("Reshape", joined, np.array([0, 0, heads, 2 * pairs] if first else [0, heads, 0, 2 * pairs]))


@settings(max_examples=25)
@given(
    first=st.booleans(), interleaved=st.booleans(), how=st.sampled_from(["gather", "squeeze"]), order=st.integers(0, 1),
    heads=st.integers(1, 3), pairs=st.integers(1, 4), batch=st.sampled_from([1, 2, "N"]), own=st.booleans(),
)  # fmt: skip
def test_rotary_embedding(first, interleaved, how, order, heads, pairs, batch, own):
    if pairs == 1 and interleaved:
        pairs = 2  # the pair is the head then, and the graph another
    shape = (batch, "S", heads, 2 * pairs) if first else (batch, heads, "S", 2 * pairs)
    samples = batch if own else 1
    table = (samples, "S", 1, pairs) if first else (samples, 1, "S", pairs)
    w = Writing({"x": shape, "c": table, "s": table}, 17)
    y = w.call("Neg", rotated(w, w.call("Relu", "x"), heads, pairs, first, interleaved, how, ("c", "s"), order))
    rng = np.random.default_rng(0)
    sizes = {"N": 3, "S": 5}
    feeds = {
        name: rng.standard_normal([sizes[d] if isinstance(d, str) else d for d in dims]).astype(np.float32)
        for name, dims in w.inputs.items()
    }
    result = fuse(w.model(y), feeds)
    assert operators(result.model).count("RotaryEmbedding") == 1
    assert not {"Mul", "Sub", "Add"} & set(operators(result.model))
    assert result.model.opset_imports[""] == 23


def _tables(rank_shape=(1, 5, 1, 2)):
    angles = np.random.default_rng(0).uniform(0, 6, rank_shape)
    return np.cos(angles), np.sin(angles)


@pytest.mark.parametrize("wrong", ["signs", "exchanged", "tables", "other", "halves", "shape", "read"])
def test_no_rotary_embedding(wrong):
    w = Writing({"x": (2, 5, 3, 4), "z": (2, 5, 3, 4)}, 17)
    c, s = (w.constant(t) for t in _tables((1, 5, 3, 2) if wrong == "shape" else (1, 5, 1, 2)))
    one, two = (last(4, w, "x", k, 2, "slice") for k in (0, 1))
    if wrong == "other":
        two = last(4, w, "z", 1, 2, "slice")
    if wrong == "halves":
        two = last(4, w, "x", 0, 2, "slice")
    real = w.call("Add" if wrong == "signs" else "Sub", w.call("Mul", one, c), w.call("Mul", two, s))
    if wrong == "tables":
        c, s = s, c
    imaginary = w.call("Add", w.call("Mul", one, s), w.call("Mul", two, c))
    y = w.call("Concat", *([imaginary, real] if wrong == "exchanged" else [real, imaginary]), axis=-1)
    outputs = [w.call("Neg", real)] if wrong == "read" else []
    assert "RotaryEmbedding" not in operators(fuse(w.model(w.call("Relu", y), *outputs)).model)


@dataclass(frozen=True)
class Wiring:
    """How attention is written."""

    rows_first: bool = True
    """q, k and v are (B, S, H, D)."""
    joined: bool = True
    """The result goes on as (B, S, H, D)."""
    groups: int = 1
    """Heads of q to one of k and v."""
    repeat: str = "tile"
    scale: str = "div"
    mask: str = "full"
    """none, full, row, heads: (S, S), (B, 1, 1, S), (1, H, S, S)."""
    size: int = 4
    heads: int = 4


wirings = st.builds(
    Wiring,
    rows_first=st.booleans(),
    joined=st.booleans(),
    groups=st.sampled_from([1, 2, 4]),
    repeat=st.sampled_from(["tile", "expand"]),
    scale=st.sampled_from(["none", "div", "mul", "q", "k"]),
    mask=st.sampled_from(["none", "full", "row", "heads"]),
    size=st.integers(1, 5),
)


def attention(
    wiring: Wiring, batch: int | str = "B", rows: int | str = "S", columns: int | str = "S"
) -> tuple[Writing, str]:
    """Of inputs q, k, v and m."""
    few = wiring.heads // wiring.groups
    masks: dict = {"full": (rows, columns), "row": (batch, 1, 1, columns), "heads": (1, wiring.heads, rows, columns)}
    shapes: dict = {}
    for name, heads, places in (("q", wiring.heads, rows), ("k", few, columns), ("v", few, columns)):
        pair = (places, heads) if wiring.rows_first else (heads, places)
        shapes[name] = (batch, *pair, wiring.size)
    if wiring.mask != "none":
        shapes["m"] = masks[wiring.mask]
    w = Writing(shapes, 17)

    def grouped(name: str) -> str:
        value = w.call("Relu", name)
        if wiring.groups == 1:
            return value
        axis = 2 if wiring.rows_first else 1
        opened = w.call("Unsqueeze", value, np.array([axis + 1]))
        times = [1] * 5
        times[axis + 1] = wiring.groups
        many = w.call("Tile" if wiring.repeat == "tile" else "Expand", opened, np.array(times))
        return w.call(
            "Reshape",
            many,
            np.array([0, 0, wiring.heads, wiring.size] if wiring.rows_first else [0, wiring.heads, -1, wiring.size]),
        )

    q, k, v = w.call("Relu", "q"), grouped("k"), grouped("v")
    if wiring.rows_first:
        q, v = (w.call("Transpose", x, perm=[0, 2, 1, 3]) for x in (q, v))
        k = w.call("Transpose", k, perm=[0, 2, 3, 1])
    else:
        k = w.call("Transpose", k, perm=[0, 1, 3, 2])
    factor = 1 / math.sqrt(wiring.size)
    if wiring.scale == "q":
        q = w.call("Mul", q, factor)
    if wiring.scale == "k":
        k = w.call("Mul", factor, k)
    scores = w.call("MatMul", q, k)
    if wiring.scale == "div":
        scores = w.call("Div", scores, 1 / factor)
    if wiring.scale == "mul":
        scores = w.call("Mul", scores, factor)
    if wiring.mask != "none":
        scores = w.call("Add", scores, "m")
    y = w.call("MatMul", w.call("Softmax", scores, axis=-1), v)
    if wiring.joined:
        y = w.call("Transpose", y, perm=[0, 2, 1, 3])
    return w, w.call("Neg", y)


def _feeds(w: Writing, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    shapes = {name: [sizes[d] if isinstance(d, str) else d for d in dims] for name, dims in w.inputs.items()}
    feeds = {name: rng.standard_normal(dims).astype(np.float32) for name, dims in shapes.items()}
    if "m" in feeds:
        feeds["m"] = np.where(feeds["m"] > 0.5, np.float32(-1e9), np.float32(0))
    return feeds


@settings(max_examples=60)
@given(wiring=wirings, cross=st.booleans(), batch=st.sampled_from([1, 2, "B"]))
def test_attention(wiring, cross, batch):
    w, y = attention(wiring, batch, "S", "T" if cross else "S")
    model = w.model(y)
    result = fuse(model, _feeds(w, {"B": 2, "S": 3, "T": 5}))
    found = operators(result.model)
    assert found.count("Attention") == 1
    assert not {"Softmax", "MatMul", "Add", "Mul", "Div", "Tile"} & set(found)
    (node,) = (n for n in result.model.graph if n.op_type == "Attention")
    assert node.attributes["scale"].value == pytest.approx(1 if wiring.scale == "none" else wiring.size**-0.5)
    if wiring.rows_first and wiring.joined:
        assert "Transpose" not in found
        assert node.attributes["kv_num_heads"].value == wiring.heads // wiring.groups


def test_a_mask_of_one_row_is_repeated_once():
    """Two layers with one mask: BERT's."""
    w = Writing({"x": ("B", "S", 8), "m": ("B", 1, 1, "S")}, 17)
    x, rng = "x", np.random.default_rng(0)
    for _ in range(2):
        q, k, v = (w.call("MatMul", x, rng.standard_normal((8, 8)) / 3) for _ in range(3))
        q, k, v = (w.call("Reshape", each, np.array([0, 0, 2, 4])) for each in (q, k, v))
        scores = w.call("MatMul", w.call("Transpose", q, perm=[0, 2, 1, 3]), w.call("Transpose", k, perm=[0, 2, 3, 1]))
        p = w.call("Softmax", w.call("Add", w.call("Div", scores, 2.0), "m"), axis=-1)
        y = w.call("Transpose", w.call("MatMul", p, w.call("Transpose", v, perm=[0, 2, 1, 3])), perm=[0, 2, 1, 3])
        x = w.call("Add", x, w.call("Reshape", y, np.array([0, 0, 8])))
    feeds = _feeds(w, {"B": 2, "S": 5})
    feeds["m"][0] = np.finfo(np.float32).min  # what exporters write for nothing to attend to: a mean of all
    feeds["m"][1, ..., 2:] = np.finfo(np.float32).min
    result = fuse(w.model(x), feeds)
    assert sorted(operators(result.model)) == sorted(
        [*["MatMul"] * 6, *["Attention"] * 2, *["Add"] * 2, "Max", "Shape", "Concat", "Expand"]
    )


LOWEST = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class Guarded:
    """How PyTorch's scaled dot-product attention is written: rows that are NaN become zeros."""

    mask: str = "chosen"
    """none; fed: values of any kind; chosen: 0 or `hidden`."""
    hidden: float = -math.inf
    one_row: bool = False
    rows_first: bool = True
    batches: bool = True
    """k is transposed as matrices (B * H, S, D)."""
    size: int = 4


def guarded(wiring: Guarded, *, zero: float = 0.0, shown: bool = False) -> tuple[Writing, list[str]]:
    """Of inputs q, k, v and m. `shown`: the softmax is read elsewhere."""
    heads = 2
    shapes: dict = {name: ("B", places, heads, wiring.size) if wiring.rows_first else ("B", heads, places, wiring.size)
                    for name, places in (("q", "S"), ("k", "T"), ("v", "T"))}  # fmt: skip
    shapes["m"] = ("B", 1, 1 if wiring.one_row else "S", "T")
    w = Writing(shapes, 18)
    q, k, v = (w.call("Relu", name) for name in "qkv")
    if wiring.rows_first:
        q, k, v = (w.call("Transpose", x, perm=[0, 2, 1, 3]) for x in (q, k, v))
    if wiring.batches:
        shape = w.call("Shape", k)
        lead, rows = w.call("Slice", shape, np.array([0]), np.array([-2])), w.call("Shape", "m", start=3)
        wide = np.array([wiring.size])
        k = w.call("Reshape", k, w.call("Concat", np.array([-1]), rows, wide, axis=0))
        k = w.call("Transpose", k, perm=[0, 2, 1])
        k = w.call("Reshape", k, w.call("Concat", lead, wide, rows, axis=0))
    else:
        k = w.call("Transpose", k, perm=[0, 1, 3, 2])
    root = wiring.size**-0.25
    scores = w.call("MatMul", w.call("Mul", q, root), w.call("Mul", k, root))
    if wiring.mask == "chosen":
        seen = w.call("Greater", "m", 0.0)
        scores = w.call("Add", scores, w.call("Where", seen, 0.0, wiring.hidden))
    if wiring.mask == "fed":
        scores = w.call("Add", scores, "m")
    p = w.call("Softmax", scores, axis=-1)
    y = w.call("MatMul", w.call("Where", w.call("IsNaN", p), zero, p), v)
    y = w.call("Transpose", y, perm=[0, 2, 1, 3]) if wiring.rows_first else y
    return w, [w.call("Neg", y), *([w.call("Neg", p)] if shown else [])]


def simplified(w: Writing, outputs: list[str]) -> ir.Model:
    """Before it is, k is read for its shape as well."""
    return Simplify(use_onnxsim=False).run(w.model(*outputs), Context()).model


@settings(max_examples=80)
@given(
    wiring=st.builds(
        Guarded,
        mask=st.sampled_from(["none", "fed", "chosen"]),
        hidden=st.sampled_from([-math.inf, LOWEST, -1e9]),
        one_row=st.booleans(),
        rows_first=st.booleans(),
        batches=st.booleans(),
        size=st.integers(2, 5),
    ),
    seed=st.integers(0, 2**32 - 1),
)
def test_guarded_attention(wiring, seed):
    """Rows of which a mask leaves nothing: zeros where it is infinite, the mean of all values where it is a number."""
    w, outputs = guarded(wiring)
    rng = np.random.default_rng(seed)
    sizes = {"B": 3, "S": 4, "T": 5}
    shapes = {name: [sizes[d] if isinstance(d, str) else d for d in dims] for name, dims in w.inputs.items()}
    feeds = {name: rng.standard_normal(dims).astype(np.float32) for name, dims in shapes.items()}
    if wiring.mask == "fed":
        numbers = np.array([0, 0.5, -1e9, LOWEST, -np.inf], np.float32)
        feeds["m"] = rng.choice(numbers, shapes["m"])
        feeds["m"][0] = -np.inf
        feeds["m"][1, ..., -1, :] = rng.choice(numbers[-2:], sizes["T"])
    feeds["m"][2, ..., 0, :] = LOWEST  # of "chosen": hidden
    found = operators(fuse(simplified(w, outputs), feeds).model)
    assert found.count("Attention") == 1
    assert not {"Softmax", "IsNaN", "MatMul", "Add", "Mul", "Slice"} & set(found)
    assert found.count("Transpose") == 0
    assert found.count("Where") == (wiring.mask != "none")
    assert "Max" not in found
    assert found.count("Equal") == (wiring.mask == "fed")


def test_a_mask_of_numbers_is_made_once():
    """The Where that chooses the lowest float32 chooses a number above it instead."""
    w, outputs = guarded(Guarded(hidden=LOWEST))
    model = fuse(simplified(w, outputs)).model
    (chosen,) = (node for node in model.graph if node.op_type == "Where")
    numbers = [g.constant_of(value) for value in chosen.inputs[1:]]
    assert [LOWEST < number < -1e38 for number in numbers if number is not None] == [False, True]


def traced(kind: str, size: int, layers: int = 2, longest: int = 16) -> tuple[Writing, str]:
    """An encoder as the exporter that traces writes it, of x (B, S, 2 * size) and m (B, S), 0 where nothing is read.

    Positions are cut off a table; the mask is gathered from a flattened one by indices in order and expanded to a
    target in which -1 stands for a size that stays; q, k and v are reshaped by the shapes of what they come from, and
    the result by its own. `kind`: sdpa, with the guard and -inf; eager, with the lowest float32; causal, sdpa that
    looks back only.
    """
    heads, wide = 2, 2 * size
    rng = np.random.default_rng(3)
    w = Writing({"x": ("B", "S", wide), "m": ("B", "S")}, 17)

    def sized(value: str, axis: int) -> tuple[str, str]:
        """As a number and as a vector of one."""
        number = w.call("Gather", w.call("Shape", value), np.array(axis, np.int64), axis=0)
        return number, w.call("Unsqueeze", number, np.array([0]))

    def stretched(value: str, *target) -> str:
        """Expand as PyTorch does."""
        wanted = w.call("Concat", *target, axis=0)
        rank = w.call("ConstantOfShape", np.array([len(target)]), value=ir.to_proto(ir.tensor([1], ir.DataType.INT64)))
        same = w.call("Equal", wanted, w.call("Mul", rank, np.array(-1)))
        return w.call("Expand", value, w.call("Where", same, rank, wanted))

    def ramp(number: str, *axes: int) -> str:
        return w.call("Unsqueeze", w.call("Range", np.array(0), number, np.array(1)), np.array(axes))

    minus = np.array([-1])
    places = w.call("Slice", rng.standard_normal((1, longest, wide)), np.array([0]), sized("x", 1)[1], np.array([1]))
    x = w.call("Add", "x", places)
    (batch, batches), (count, counts) = sized(x, 0), sized(x, 1)
    flat = w.call("Flatten", w.call("Unsqueeze", w.call("Cast", "m", to=9), np.array([2])), axis=2)
    index = w.call("Add", ramp(count, 0, 1, 2), w.call("Mul", ramp(batch, 1, 2, 3), sized("m", 1)[0]))
    seen = w.call("Reshape", w.call("Gather", flat, index, axis=0), minus)
    seen = w.call("Reshape", seen, w.call("Shape", index))
    rows, columns = ramp(count, 0, 1, 3), ramp(sized("m", 1)[0], 0, 1, 2)
    back = w.call("LessOrEqual", columns, rows) if kind == "causal" else w.call("GreaterOrEqual", rows, np.array(0))
    seen = w.call("And", back, seen)
    seen = stretched(seen, batches, minus, counts, counts)
    mask = w.call("Where", seen, 0.0, LOWEST if kind == "eager" else -math.inf)
    for _ in range(layers):
        q, k, v = (w.call("MatMul", x, rng.standard_normal((wide, wide)) / 3) for _ in range(3))
        head = np.array([size])
        q, k, v = (w.call("Reshape", y, w.call("Concat", batches, counts, minus, head, axis=0)) for y in (q, k, v))
        q, k, v = (w.call("Transpose", y, perm=[0, 2, 1, 3]) for y in (q, k, v))
        k = w.call("Transpose", k, perm=[0, 1, 3, 2])
        if kind == "eager":
            scores = w.call("Mul", w.call("MatMul", q, k), size**-0.5)
        else:
            scores = w.call("MatMul", w.call("Mul", q, size**-0.25), w.call("Mul", k, size**-0.25))
        p = w.call("Softmax", w.call("Add", scores, mask), axis=-1)
        if kind != "eager":
            p = w.call("Where", w.call("IsNaN", p), 0.0, p)
        y = w.call("MatMul", p, v)
        if kind != "eager":
            y = w.call("Reshape", y, w.call("Concat", sized(y, 0)[1], minus, counts, head, axis=0))
        y = w.call("Transpose", y, perm=[0, 2, 1, 3])
        x = w.call("Add", x, w.call("Reshape", y, w.call("Concat", batches, counts, np.array([heads * size]), axis=0)))
    return w, x


@settings(max_examples=12)
@given(kind=st.sampled_from(["sdpa", "eager", "causal"]), size=st.integers(2, 4), seed=st.integers(0, 2**32 - 1))
def test_traced_attention(kind, size, seed):
    """Masks of all kinds, also of samples of which nothing is to be read; all that made the mask is one Where."""
    w, output = traced(kind, size)
    rng = np.random.default_rng(seed)
    batch, count = int(rng.integers(2, 5)), int(rng.integers(1, 17))
    feeds = {"x": rng.standard_normal((batch, count, 2 * size)), "m": rng.integers(0, 2, (batch, count))}
    feeds["m"][0] = 0
    found = operators(fuse(simplified(w, [output]), {name: a.astype(np.float32) for name, a in feeds.items()}).model)
    assert (found.count("Attention"), found.count("Where")) == (2, 1)
    assert not {"Softmax", "IsNaN", "Transpose", "Equal", "Flatten", "Mul", "Max"} & set(found)
    assert (found.count("Gather"), found.count("Squeeze")) == (0, 1)
    assert found.count("MatMul") == 6 and len(found) <= 23


@pytest.mark.parametrize("wrong", ["zero", "shown"])
def test_no_guarded_attention(wrong):
    w, outputs = guarded(Guarded(), zero=0.5 if wrong == "zero" else 0.0, shown=wrong == "shown")
    assert "Attention" not in operators(fuse(simplified(w, outputs)).model)


@pytest.mark.parametrize(
    "wrong",
    [
        "softmax axis",
        "mask after",
        "scaled twice by a value",
        "perm of k",
        "mask rows",
        "probabilities",
        "read",
        "divided",
        "negative",
    ],
)
def test_no_attention(wrong):
    rows, columns = 3, 5
    w = Writing(
        {
            "q": (2, 4, rows, 4),
            "k": (2, 4, columns, 4),
            "v": (2, 4, columns, 4),
            "m": (3, 5) if wrong != "mask rows" else (2, 4, 1, 1),
            "z": (2, 4, 3, 5),
        },
        17,
    )
    if wrong == "perm of k":
        w = Writing({"q": (2, 4, 4, 4), "k": (2, 4, 4, 4), "v": (2, 4, 4, 4), "m": (4, 4), "z": (2, 4, 4, 4)}, 17)
    k = w.call("Transpose", "k", perm=[0, 1, 2, 3] if wrong == "perm of k" else [0, 1, 3, 2])
    scores = w.call("MatMul", "q", w.call("Relu", k) if wrong == "perm of k" else k)
    if wrong == "mask after":
        scores = w.call("Mul", w.call("Add", scores, "m"), 0.5)
    elif wrong == "scaled twice by a value":
        scores = w.call("Add", w.call("Mul", scores, "z"), "m")
    elif wrong == "divided":
        scores = w.call("Div", 2.0, scores)
    elif wrong == "negative":
        scores = w.call("Mul", scores, -0.5)
    else:
        scores = w.call("Add", scores, "m")
    p = w.call("Softmax", scores, axis=2 if wrong == "softmax axis" else -1)
    outputs = [w.call("Neg", p)] if wrong == "read" else []
    p = w.call("Relu", p) if wrong == "probabilities" else p
    p = w.call("Add", p, 0.5) if wrong == "probabilities" else p
    y = w.call("MatMul", p, "v")
    assert "Attention" not in operators(fuse(w.model(w.call("Relu", y), *outputs)).model)


def test_decoder(shared_model):
    """A LLaMA-type decoder: a rotary embedding each for q and k, attention of groups, two norms in each of 5 layers."""
    original: ir.Model = models.load(shared_model("stories260k"))
    simplified = Simplify(use_onnxsim=False).run(original.clone(), Context()).model
    tokens = np.random.default_rng(0).integers(0, 500, (2, 9))
    result = fuse(simplified, {"input_ids": tokens})
    found = operators(result.model)
    assert (found.count("RotaryEmbedding"), found.count("Attention"), found.count("RMSNormalization")) == (10, 5, 11)
    assert len(found) <= 103
