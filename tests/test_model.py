"""Loading, checking, saving and fixing models: real files, and files that are broken in every way."""

from __future__ import annotations

import os
import struct

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphopt import checking
from graphopt import model as models
from graphopt.errors import ModelError
from graphopt.shapes.inferred import inferred_shapes
from tests.passes.oracle import SHAPES, random_feeds, run
from tests.rewrites.pairs import parse

SMALL = "g (float[N, 2] x) => (float[N, 2] y) <float[2] w = {1, 2}> { r = Relu(x) y = Add(r, w) }"


@pytest.fixture
def small(tmp_path):
    models.save(parse(SMALL), tmp_path / "small.onnx")
    return tmp_path / "small.onnx"


def refused(path, *words):
    with pytest.raises(ModelError) as caught:
        models.load(path)
    text = str(caught.value)
    assert "\n" not in text
    for word in words:
        assert word in text, text
    return text


def test_round_trip(small):
    model = models.load(small)
    models.save(model, small.with_name("again.onnx"))
    assert small.read_bytes() == small.with_name("again.onnx").read_bytes() == models.to_bytes(model)
    assert models.digest(model) == models.file_digest(small)
    assert models.parameter_bytes(model) == 8
    assert [str(s) for s in models.signature(model).inputs] == ["x: float32[N,2]"]


def test_not_a_file(tmp_path):
    refused(tmp_path / "missing.onnx", "no such file")
    refused(tmp_path, "is a folder")
    (tmp_path / "empty.onnx").write_bytes(b"")
    refused(tmp_path / "empty.onnx", "is empty")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable(small):
    small.chmod(0)
    refused(small, "cannot read")


@pytest.mark.parametrize(
    "content", [b"hello, world", b"\x00" * 64, b"\xff" * 64, b"PK\x03\x04" + b"\x00" * 50, bytes(range(256)), b"{}"]
)
def test_garbage(tmp_path, content):
    (tmp_path / "m.onnx").write_bytes(content)
    refused(tmp_path / "m.onnx", "m.onnx")


def test_every_truncation_is_refused_or_is_still_a_valid_model(small, tmp_path):
    whole = small.read_bytes()
    cut = tmp_path / "cut.onnx"
    refusals = 0
    for length in range(1, len(whole)):
        cut.write_bytes(whole[:length])
        try:
            models.load(cut)
        except ModelError as error:
            assert "\n" not in str(error)
            refusals += 1
    assert refusals > 0.9 * len(whole)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=4))
def test_any_damage_is_refused_in_one_line_or_harmless(small, tmp_path, changes):
    content = bytearray(small.read_bytes())
    for where, byte in changes:
        content[int(where * len(content))] = byte
    (tmp_path / "damaged.onnx").write_bytes(content)
    try:
        models.load(tmp_path / "damaged.onnx")
    except ModelError as error:
        assert "\n" not in str(error)


def test_a_huge_declared_tensor_is_refused_before_it_is_allocated(tmp_path):
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1 << 40, 1 << 20], raw_data=b"\x00" * 8)
    proto = onnx.load_from_string(models.to_bytes(parse(SMALL)))
    proto.graph.initializer[0].CopyFrom(tensor)
    (tmp_path / "huge.onnx").write_bytes(proto.SerializeToString())
    refused(tmp_path / "huge.onnx", "huge.onnx")


def test_a_tensor_with_too_little_data(tmp_path):
    proto = onnx.load_from_string(models.to_bytes(parse(SMALL)))
    proto.graph.initializer[0].CopyFrom(TensorProto(name="w", data_type=1, dims=[2], raw_data=b"\x00" * 4))
    (tmp_path / "short.onnx").write_bytes(proto.SerializeToString())
    refused(tmp_path / "short.onnx", "short.onnx")


def test_initializers_of_one_name(tmp_path):
    proto = onnx.load_from_string(models.to_bytes(parse(SMALL)))
    proto.graph.initializer.append(numpy_helper.from_array(np.array([5, 6], np.float32), "w"))
    (tmp_path / "twice.onnx").write_bytes(proto.SerializeToString())
    refused(tmp_path / "twice.onnx", "w", "not unique")


def test_an_unknown_domain_is_named(tmp_path):
    graph = helper.make_graph(
        [helper.make_node("Magic", ["x"], ["y"], name="wand", domain="org.example")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("org.example", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), tmp_path / "m.onnx")
    refused(tmp_path / "m.onnx", "Magic", "org.example", "wand")


def test_a_name_that_is_no_text(tmp_path):
    content = models.to_bytes(parse(SMALL)).replace(b"Relu", b"Re\xb7u")
    (tmp_path / "m.onnx").write_bytes(content)
    refused(tmp_path / "m.onnx", "op_type", "UTF-8")


def test_an_invalid_graph_is_refused(tmp_path):
    proto = onnx.load_from_string(models.to_bytes(parse(SMALL)))
    proto.graph.node[0].input[0] = "nowhere"
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    refused(tmp_path / "m.onnx", "not a valid ONNX model", "nowhere")


# -- external data --------------------------------------------------------------------------------------------------


def external(folder, location, offset=0, length=None):
    proto = onnx.load_from_string(models.to_bytes(parse(SMALL)))
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    entries = {"location": location, "offset": str(offset)} | ({} if length is None else {"length": str(length)})
    for key, value in entries.items():
        tensor.external_data.add(key=key, value=value)
    folder.mkdir(exist_ok=True)
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    return folder / "m.onnx"


def test_external_data_is_read(tmp_path, monkeypatch):
    path = external(tmp_path / "a", "m.data", length=8)
    path.with_name("m.data").write_bytes(struct.pack("<2f", 3, 4))
    monkeypatch.chdir(path.parent)
    tensor = models.load("m.onnx").graph.initializers["w"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), [3, 4])


def test_external_data_that_is_missing_or_short(tmp_path):
    path = external(tmp_path / "a", "m.data", length=8)
    refused(path, "'w'", "m.data")
    path.with_name("m.data").write_bytes(b"\x00" * 4)
    refused(path, "m.data")


@pytest.mark.parametrize("location", ["../secret", "sub/../../secret"])
def test_external_data_outside_the_folder(tmp_path, location):
    (tmp_path / "secret").write_bytes(struct.pack("<2f", 3, 4))
    path = external(tmp_path / "a", location, length=8)
    (tmp_path / "a" / "sub").mkdir()
    refused(path, "secret")


def test_external_data_at_an_absolute_path(tmp_path):
    (tmp_path / "secret").write_bytes(struct.pack("<2f", 3, 4))
    refused(external(tmp_path / "a", str(tmp_path / "secret"), length=8), "secret")


def test_external_data_through_links(tmp_path):
    (tmp_path / "secret").write_bytes(struct.pack("<2f", 3, 4))
    path = external(tmp_path / "a", "m.data", length=8)
    (tmp_path / "a" / "m.data").symlink_to(tmp_path / "secret")
    refused(path, "m.data")


def test_external_data_under_another_name_of_a_file(tmp_path):
    """A hard link may be the other name of any file on the disk."""
    (tmp_path / "secret").write_bytes(struct.pack("<2f", 3, 4))
    path = external(tmp_path / "a", "m.data", length=8)
    os.link(tmp_path / "secret", tmp_path / "a" / "m.data")
    refused(path, "'w'", "hard link")


def test_external_data_below_a_linked_folder(tmp_path):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "m.data").write_bytes(struct.pack("<2f", 3, 4))
    path = external(tmp_path / "a", "sub/m.data", length=8)
    (tmp_path / "a" / "sub").symlink_to(tmp_path / "outside")
    refused(path, "symbolic link")


def test_external_data_in_what_is_no_file(tmp_path):
    path = external(tmp_path / "a", "m.data", length=8)
    os.mkfifo(tmp_path / "a" / "m.data")  # reading it would wait for ever
    refused(path, "no regular file")


@pytest.mark.parametrize(
    ("location", "offset", "length", "wanted"),
    [
        ("", 0, 8, "no name of a file"),
        ("m\0x", 0, 8, "no name of a file"),
        ("C:\\m.data", 0, 8, "absolute"),
        ("..\\m.data", 0, 8, "'..'"),
        ("m.data", -4, 8, "offset"),
        ("m.data", 1 << 62, 8, "bytes 4611686018427387904"),
        ("m.data", 4, 8, "which has 8"),
        ("m.data", 0, 1 << 40, "length says"),
        ("m.data", "x", 8, "offset"),
    ],
)
def test_external_data_that_does_not_fit(tmp_path, location, offset, length, wanted):
    path = external(tmp_path / "a", location, offset, length)
    path.with_name("m.data").write_bytes(struct.pack("<2f", 3, 4))
    refused(path, "'w'", wanted)


def test_external_data_of_a_local_function(tmp_path):
    """onnx_ir checks the tensors of the graph only; those of a function would be read from anywhere."""
    text = """<ir_version: 8, opset_import: ["" : 17, "local" : 1]> g (float[2] x) => (float[2] y) { y = local.f(x) }
      <opset_import: ["" : 17], domain: "local"> f (a) => (b) {
      c = Constant<value = float[2] {1, 2}>()  b = Add(a, c) }"""
    model = onnx.parser.parse_model(text)
    tensor = model.functions[0].node[0].attribute[0].t
    tensor.ClearField("float_data")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="m.data")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "m.onnx").write_bytes(model.SerializeToString())
    (tmp_path / "secret").write_bytes(struct.pack("<2f", 3, 4))
    (tmp_path / "a" / "m.data").symlink_to(tmp_path / "secret")
    refused(tmp_path / "a" / "m.onnx", "symbolic link")


def test_a_model_with_external_data_goes_through_the_passes(tmp_path, monkeypatch):
    path = external(tmp_path / "a", "m.data", length=8)
    path.with_name("m.data").write_bytes(struct.pack("<2f", 3, 4))
    model = models.load(path)
    monkeypatch.chdir(tmp_path)
    x = np.array([[-1, 1]], np.float32)
    np.testing.assert_array_equal(run(model.clone(), {"x": x})[0], [[3, 5]])


def test_saving_beside_a_link_leaves_what_it_points_at(tmp_path, monkeypatch):
    """Data is written under a new name and renamed: a link with its name is replaced, not followed."""
    monkeypatch.setattr(models, "PROTOBUF_LIMIT_BYTES", 4)
    (tmp_path / "secret").write_text("untouched")
    (tmp_path / "a").mkdir()
    for name in ("m.onnx", "m.onnx.data"):
        (tmp_path / "a" / name).symlink_to(tmp_path / "secret")
    models.save(parse(SMALL), tmp_path / "a" / "m.onnx")
    assert (tmp_path / "secret").read_text() == "untouched"
    assert not (tmp_path / "a" / "m.onnx.data").is_symlink()


def test_a_vector_too_long_to_follow(tmp_path):
    """ONNX makes an entry for each of the 2^42 elements that are concatenated, if it is let."""
    text = """<ir_version: 8, opset_import: ["" : 17]> g (int64[4] x) => (int64[m] y)
      <int64[4] w = {3, 5, 7, 9}, int64[1] reps = {1099511627776}> { t = Tile(w, reps)  y = Concat<axis = 0>(t, x) }"""
    (tmp_path / "m.onnx").write_bytes(onnx.parser.parse_model(text).SerializeToString())
    model = models.load(tmp_path / "m.onnx")
    assert models.fix_inputs(model, {"x": (4,)}).graph.outputs[0].shape == (4 * 1099511627776 + 4,)


def test_a_shape_that_is_no_vector_decides_nothing():
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[a] y, float[b] z) <int64 one = {1}>
      { c = ConstantOfShape(one)  y = Add(c, x)  z = Expand(x, one) }"""
    assert inferred_shapes(ir.from_proto(onnx.parser.parse_model(text)))["x"] == (2,)


def test_a_checker_that_takes_too_long_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(checking, "LIMIT_S", 0.0)
    (tmp_path / "m.onnx").write_bytes(models.to_bytes(parse(SMALL)))
    refused(tmp_path / "m.onnx", "keeps ONNX's checker busy")


# -- saving ---------------------------------------------------------------------------------------------------------


def test_saving_is_whole_or_not_at_all(small, monkeypatch):
    before = small.read_bytes()

    def full(model):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(models, "to_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        models.save(parse(SMALL), small)
    assert small.read_bytes() == before
    assert list(small.parent.iterdir()) == [small]


def test_a_model_over_the_limit_goes_beside(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "PROTOBUF_LIMIT_BYTES", 4)
    model = parse(SMALL)
    models.save(model, tmp_path / "m.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    x = np.array([[-1, 1]], np.float32)
    np.testing.assert_array_equal(run(models.load(tmp_path / "m.onnx"), {"x": x})[0], run(model, {"x": x})[0])


@pytest.mark.parametrize("text", [SMALL, "g (float[2] x) => (float[2] y) { y = Relu(x) }"])
def test_the_same_model_gives_the_same_bytes(text):
    assert models.to_bytes(parse(text)) == models.to_bytes(parse(text)) == models.to_bytes(parse(text).clone())


# -- fixing inputs --------------------------------------------------------------------------------------------------


def test_a_name_fixed_on_one_input_is_fixed_on_all():
    model = parse("g (float[N, 2] a, float[N, 2] b) => (float[N, 2] y) { y = Add(a, b) }")
    fixed = models.fix_inputs(model, {"a": (3, 2)})
    assert [str(s) for s in models.signature(fixed).inputs] == ["a: float32[3,2]", "b: float32[3,2]"]
    assert [str(s) for s in models.signature(fixed).outputs] == ["y: float32[3,2]"]
    assert not models.signature(model).is_static and models.signature(fixed).is_static


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"aa": (1, 2)}, ["no input 'aa'", "did you mean 'a'?"]),
        ({"zzz": (1, 2)}, ["no input 'zzz'", "its inputs are: a, b"]),
        ({"a": (1,)}, ["rank 2", "gives 1"]),
        ({"a": (1, 3)}, ["dimension 1 is fixed to 2", "gives 3"]),
        ({"a": (1, 2), "b": (2, 2)}, ["'N' cannot be both 1 and 2"]),
        ({"a": (0, 2)}, ["dimension 0", "positive"]),
        ({"a": (-1, 2)}, ["dimension 0", "positive"]),
    ],
)
def test_shapes_that_do_not_fit(shapes, words):
    model = parse("g (float[N, 2] a, float[N, 2] b) => (float[N, 2] y) { y = Add(a, b) }")
    with pytest.raises(ModelError) as caught:
        models.fix_inputs(model, shapes)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.shared
@pytest.mark.parametrize("name", ["nanodet_m", "style_transfer", "nsnet2", "stories260k", "resnet20_cifar10", "magika"])
def test_real_models_become_static(shared_model, name):
    model = models.load(shared_model(name))
    fixed = models.fix_inputs(model, SHAPES[name])
    models.check(fixed, name)
    assert not models.signature(model).is_static and models.signature(fixed).is_static
    unknown = [
        v.name for n in fixed.graph for v in n.outputs if v.name and (v.shape is None or not v.shape.is_static())
    ]
    assert not unknown
    feeds = random_feeds(fixed, {})
    for spec, before, after in zip(models.signature(fixed).outputs, run(model, feeds), run(fixed, feeds), strict=True):
        assert spec.shape == after.shape == before.shape
        np.testing.assert_array_equal(after, before)


def test_inputs_that_are_no_tensors_are_refused():
    model = ir.from_proto(
        helper.make_model(
            helper.make_graph(
                [helper.make_node("SequenceLength", ["s"], ["n"])],
                "g",
                [helper.make_tensor_sequence_value_info("s", TensorProto.FLOAT, None)],
                [helper.make_tensor_value_info("n", TensorProto.INT64, [])],
            )
        )
    )
    with pytest.raises(ModelError, match="sequence"):
        models.signature(model)


def test_a_large_model_is_checked_without_copying_its_weights(monkeypatch):
    monkeypatch.setattr(models, "CHECKED_WITH_WEIGHTS_BYTES", 4096)
    model = parse("g (float[N, 2] x) => (float[N, 2] y) <float[2, 2] w = {1, 2, 3, 4}> { y = MatMul(x, w) }")
    wide = np.ones((2, 2048), np.float32)
    model.graph.initializers["w"].const_value = ir.Tensor(wide, name="w")
    model.graph.initializers["w"].shape = ir.Shape(wide.shape)
    model.graph.outputs[0].shape = ir.Shape(["N", 2048])
    models.check(model, "it")
    assert "w" in model.graph.initializers and len(model.graph.inputs) == 1
    model.graph[0].op_type = "Relu"
    with pytest.raises(ModelError, match="not a valid ONNX model"):
        models.check(model, "it")
