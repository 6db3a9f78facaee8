"""The grammar of passes and targets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.errors import SpecError
from graphopt.spec import Spec, bind, parse, parse_list, unbind

WORDS = st.text(min_size=1, max_size=8)
VALUES = st.one_of(WORDS, st.text(max_size=8), st.lists(st.text(max_size=6), max_size=4).map(tuple))
NAMES = st.from_regex(r"[a-z][a-z0-9\-]{0,10}", fullmatch=True)
SPECS = st.builds(Spec, NAMES, st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), VALUES, max_size=4))


@given(SPECS)
def test_printing_and_parsing_are_inverse(spec):
    assert parse(str(spec)) == spec


@given(st.lists(SPECS, max_size=5))
def test_lists_too(specs):
    assert parse_list(",".join(map(str, specs))) == tuple(specs)


@given(st.text(alphabet='ab{}[],=" \\-1', max_size=30))
def test_any_text_parses_or_is_refused_with_a_place(text):
    try:
        specs = parse_list(text)
    except SpecError as error:
        assert text.strip()
        assert "\n" not in str(error)
    else:
        assert parse_list(",".join(map(str, specs))) == specs


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("simplify", Spec("simplify")),
        ("  simplify { } ", Spec("simplify")),
        ("q{a=1,b=[x,y]}", Spec("q", {"a": "1", "b": ("x", "y")})),
        ('q{a="b,c}",d=[]}', Spec("q", {"a": "b,c}", "d": ()})),
        ('q{a=["/conv1/Conv","with \\"quotes\\""]}', Spec("q", {"a": ("/conv1/Conv", 'with "quotes"')})),
        ('q{a=""}', Spec("q", {"a": ""})),
        ('q{a="\\u00e9"}', Spec("q", {"a": "é"})),
    ],
)
def test_what_is_read(text, spec):
    assert parse(text) == spec


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected one name, found 0"),
        ("a,b", "expected one name, found 2"),
        ("a,", "expected a name at the end"),
        (",a", "expected a name at column 1"),
        ("a{", "expected an option name at the end"),
        ("a{b}", "expected '=' at column 4"),
        ("a{b=}", "expected a value at column 5"),
        ("a{b=1", "expected ',' at the end"),
        ("a{b=1,b=2}", "option 'b' given twice"),
        ("a{b=[1,[2]]}", "expected a value at column 8"),
        ('a{b="open}', "cannot read"),
        ('a{b="\\x"}', "not a valid quoted string"),
        ("a b", "expected ','"),
        ("a}", "expected ','"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(SpecError) as caught:
        parse(text)
    assert message in str(caught.value)


@dataclass(frozen=True)
class Options:
    count: int = 1
    ratio: float = 0.5
    deep: bool = False
    mode: Literal["minmax", "percentile", 8] = "minmax"
    names: tuple[str, ...] = ()
    limit: int | None = None
    path: str = ""

    def __post_init__(self):
        if self.count < 0:
            raise ValueError("count must not be negative")


OPTIONS = st.builds(
    Options,
    count=st.integers(0, 10**20),
    ratio=st.floats(allow_nan=False),
    deep=st.booleans(),
    mode=st.sampled_from(["minmax", "percentile", 8]),
    names=st.lists(st.text(max_size=8), max_size=3).map(tuple),
    limit=st.none() | st.integers(),
    path=st.text(max_size=8),
)


@given(OPTIONS)
def test_binding_what_was_unbound(options):
    text = str(unbind("thing", options))
    assert bind(parse(text), Options, "pass") == options


def test_defaults_are_left_out():
    assert str(unbind("thing", Options(count=3))) == "thing{count=3}"


def test_words_are_read_as_their_fields_want():
    text = "t{count=3,ratio=1e-3,deep=Yes,mode=8,names=one,limit=none}"
    assert bind(parse(text), Options, "pass") == Options(3, 1e-3, True, 8, ("one",), None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("t{cuont=1}", "did you mean 'count'?"),
        ("t{zzz=1}", "its options are: count, deep"),
        ("t{count=1.5}", "must be an integer"),
        ("t{ratio=half}", "must be a number"),
        ("t{deep=maybe}", "must be true or false"),
        ("t{mode=percentle}", "did you mean 'percentile'?"),
        ("t{count=[1,2]}", "a list is not allowed here"),
        ("t{count=-1}", "count must not be negative"),
    ],
)
def test_binding_refuses_with_advice(text, message):
    with pytest.raises(SpecError) as caught:
        bind(parse(text), Options, "pass")
    assert message in str(caught.value)
    assert "'t'" in str(caught.value)
