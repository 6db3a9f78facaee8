"""What targets can do, as passes see it."""

from __future__ import annotations

import pytest

from graphopt import capabilities as caps
from graphopt.errors import SpecError


@pytest.mark.parametrize(
    ("mcpu", "dot", "lanes", "reduced"),
    [
        ("x86-64-v2", "none", 4, True),
        ("haswell", "avx2", 8, True),
        ("alderlake", "avxvnni", 8, False),
        ("skylake-avx512", "avx512bw", 16, True),
        ("cascadelake", "avx512vnni", 16, False),
        ("znver4", "avx512vnni", 16, False),
        ("sapphirerapids", "amx", 16, False),
    ],
)
def test_x86_processors(mcpu, dot, lanes, reduced):
    found = caps.x86_for_mcpu(mcpu)
    assert (found.arch, found.dot_int8, found.float_lanes) == ("x86_64", dot, lanes)
    assert found.reduce_range is reduced
    assert found.activation_dtype == "uint8"
    assert found.channel_block == lanes


def test_arm_multiplies_signed_by_signed_in_full_range():
    for dot in ("smlal", "sdot", "i8mm"):
        found = caps.Capabilities("aarch64", frozenset(), dot, 4)  # type: ignore[arg-type]
        assert found.activation_dtype == "int8"
        assert not found.reduce_range
        assert found.describe()["quantization recipe"] == "S8S8"


def test_an_unknown_processor_is_refused_with_the_nearest():
    with pytest.raises(SpecError, match="did you mean 'cascadelake'"):
        caps.x86_for_mcpu("cascadelak")


def test_every_processor_knows_what_those_below_it_know():
    for name, features in caps.X86_FEATURES.items():
        if "avx512f" in features:
            assert "avx2" in features, name
        if "amx_int8" in features:
            assert "avx512_vnni" in features, name


def test_the_host(monkeypatch, tmp_path):
    host = caps.host_capabilities()
    assert host.arch in ("x86_64", "aarch64")
    assert host.features == caps.host_features()
    text = host.describe()
    assert text["architecture"] == host.arch and ("reduced range" in text["quantization recipe"]) == host.reduce_range


@pytest.mark.parametrize(
    ("features", "mcpu"),
    [
        (caps.X86_FEATURES["cascadelake"] | {"ssse3", "sse4_2"}, "cascadelake"),
        (caps.X86_FEATURES["haswell"], "x86-64-v3"),
        (frozenset({"sse4_2", "ssse3"}), "x86-64-v2"),
        (frozenset(), "x86-64"),
    ],
)
def test_the_host_is_named_by_what_it_has(monkeypatch, features, mcpu):
    monkeypatch.setattr(caps, "host_features", lambda: features)
    assert caps.host_mcpu() == mcpu


@pytest.mark.parametrize(("features", "dot"), [(set(), "smlal"), ({"asimddp"}, "sdot"), ({"asimddp", "i8mm"}, "i8mm")])
def test_an_arm_host(monkeypatch, features, dot):
    monkeypatch.setattr(caps.platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(caps, "host_features", lambda: frozenset(features))
    found = caps.host_capabilities()
    assert (found.arch, found.dot_int8) == ("aarch64", dot)
