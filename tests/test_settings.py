from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.errors import SpecError
from graphopt.settings import Settings, parse_input, read_recipe


@given(
    passes=st.sampled_from(["simplify", 'simplify,quantize-int8{exclude=["a\\"b",c]}', ""]),
    seed=st.integers(0, 2**31),
    max_drop=st.floats(0, 10),
    calib=st.none() | st.just("random") | st.text(min_size=1),
    inputs=st.dictionaries(st.text(min_size=1), st.lists(st.integers(1, 999), min_size=1).map(tuple), max_size=2),
)
def test_a_recipe_reads_back_what_was_written(tmp_path_factory, passes, seed, max_drop, calib, inputs):
    settings = Settings("m.onnx", passes=passes, seed=seed, max_drop=max_drop, calib=calib, inputs=inputs)
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    path.write_text(settings.to_toml(), encoding="utf-8")
    assert dataclasses.replace(Settings(**read_recipe(path)), preset=settings.preset) == settings


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[optimize]\nmax_dorp = 1.0\n", "unknown option 'max_dorp'; did you mean 'max_drop'?"),
        ("[optimize]\nseed = 'x'\n", "must be int"),
        ("[optimize]\nengine = 'gpu'\n", "must be one of auto"),
        ("[optimise]\n", "not 'optimise'"),
        ("[optimize\n", "not valid TOML"),
        ("[optimize.inputs]\nx = [0, 3]\n", "positive integers"),
    ],
)
def test_a_wrong_recipe_is_refused_in_one_line(tmp_path, text, complaint):
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(SpecError, match=None) as caught:
        read_recipe(path)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_input_grammar():
    assert parse_input("x:1,3,224,224") == ("x", (1, 3, 224, 224))
    assert parse_input("serving:default:0:1,16") == ("serving:default:0", (1, 16))
    for wrong in ("x", "x:", "x:1,a", ":1", "x:1,0,3"):
        with pytest.raises(SpecError):
            parse_input(wrong)


@pytest.mark.parametrize(
    "wrong",
    [{"max_drop": -1.0}, {"threads": 0}, {"tune_seconds": -1.0}, {"engine": "gpu"},
     {"preset": "int9"}, {"calib_samples": 0}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(SpecError):
        Settings("m.onnx", **wrong).resolved()
