import itertools

import numpy as np
import pytest

from graphopt.errors import SpecError
from graphopt.model import Signature, TensorSpec
from graphopt.sizes.grammar import parse
from graphopt.sizes.plan import SizePlan


@pytest.mark.parametrize(
    ("texts", "found"),
    [
        (["s=8"], [{"s": (8, 8)}]),
        (["s=8,16"], [{"s": (8, 8)}, {"s": (16, 16)}]),
        (["s=4..20/8"], [{"s": (4, 8)}, {"s": (9, 16)}, {"s": (17, 20)}]),
        (["s=1..4"], [{"s": (1, 1)}, {"s": (2, 2)}, {"s": (3, 4)}]),
        (["h=8 w=8", "h=9 w=9"], [{"h": (8, 8), "w": (8, 8)}, {"h": (9, 9), "w": (9, 9)}]),
        (["h=8,9 w=7"], [{"h": (8, 8), "w": (7, 7)}, {"h": (9, 9), "w": (7, 7)}]),
        (["s=8", "s=8"], [{"s": (8, 8)}]),
        (["x:1=3"], [{"x:1": (3, 3)}]),
    ],
)
def test_parse(texts, found):
    assert list(parse(texts)) == found


@pytest.mark.parametrize("high", [2, 7, 100, 256, 1000])
def test_ranges_have_no_gaps_and_little_padding(high):
    ranges = [each["s"] for each in parse([f"s=2..{high}"])]
    assert ranges[0][0] == 2
    assert ranges[-1][1] == high
    for (_, before), (low, end) in itertools.pairwise(ranges):
        assert low == before + 1
        assert end <= 1.5 * before + 1


@pytest.mark.parametrize("text", ["", "s", "s=", "s=0", "s=4..2", "s=a", "s=1 s=2", "s=4..8/0", "s=1..4096/1", "=3"])
def test_what_is_no_size(text):
    with pytest.raises(SpecError, match="--sizes"):
        parse([text])


def _signature(*shapes):
    return Signature(tuple(TensorSpec(f"x{i}", np.dtype("f4"), shape) for i, shape in enumerate(shapes)), ())


def test_a_plan_fixes_all_dimensions():
    plan = SizePlan.of(_signature(("batch", "seq", 4), ("seq", None)), ["seq=8..16 x1:1=3"])
    assert {name: list(places) for name, places in plan.dimensions.items()} == {
        "batch": [("x0", 0)],
        "seq": [("x0", 1), ("x1", 0)],
        "x1:1": [("x1", 1)],
    }
    assert [str(e) for e in plan.entries] == [
        "batch=1 seq=8 x1:1=3", "batch=1 seq=9..12 x1:1=3", "batch=1 seq=13..16 x1:1=3",
    ]  # fmt: skip
    assert plan.input_shapes(plan.entries[1].largest) == {"x0": (1, 12, 4), "x1": (12, 3)}


@pytest.mark.parametrize(
    ("text", "message"), [("sek=8", "did you mean 'seq'"), ("batch=2", "leaves the dimension 'seq' open")]
)
def test_what_a_plan_refuses(text, message):
    with pytest.raises(SpecError) as refused:
        SizePlan.of(_signature(("batch", "seq")), [text])
    assert message in str(refused.value)
