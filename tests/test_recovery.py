"""Which layers go back to float, how many evaluations that takes, and what is said when nothing helps."""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import numpy_helper, parser

from graphopt import model as models
from graphopt.calibration import collect_statistics, random_dataset
from graphopt.capabilities import x86_for_mcpu
from graphopt.passes.base import Context
from graphopt.passes.quantize_int8 import QuantizeInt8
from graphopt.recovery import Returned, quantized_layers, rank_layers, recover


def blank(excluded: tuple[str, ...]) -> ir.Model:
    """A stand-in whose doc string says what is excluded."""
    model = ir.from_proto(
        parser.parse_model('<ir_version: 8, opset_import: ["" : 17]> g (float[1] x) => (float[1] y) { y = Relu(x) }')
    )
    model.doc_string = ",".join(excluded)
    return model


def count(model: ir.Model) -> int:
    return len([name for name in (model.doc_string or "").split(",") if name])


RANKED = tuple(Returned(f"n{i}", 10.0 - i) for i in range(28))


@given(st.integers(0, 28))
def test_the_least_prefix_is_found_in_logarithmically_many_evaluations(needed):
    found = recover(blank, RANKED, lambda model: 0.5 if count(model) >= needed else 2.0, 1.0)
    assert found.met and found.drop == 0.5
    assert found.nodes == tuple(f"n{i}" for i in range(needed)) and count(found.model) == needed
    assert len(found.trials) <= 4 * math.ceil(math.log2(29)) + 2
    assert {t.excluded: t.drop for t in found.trials}[needed] == 0.5


@given(st.sets(st.integers(0, 27), min_size=1, max_size=3))
def test_what_came_along_goes_back_to_8_bits(needed):
    wanted = {f"n{i}" for i in needed}

    def lost(model: ir.Model) -> float:
        return 0.5 if wanted <= set((model.doc_string or "").split(",")) else 2.0

    found = recover(blank, RANKED, lost, 1.0)
    assert found.met and lost(found.model) == 0.5 and wanted <= set(found.nodes)
    assert list(found.nodes) == sorted(found.nodes, key=lambda name: int(name[1:]))
    along = max(needed) + 1 - len(needed)
    assert len(found.nodes) - len(needed) <= max(1, along // 2), "at least half of what came along"


def test_when_nothing_helps_the_best_is_returned_and_says_so():
    found = recover(blank, RANKED, lambda model: 9.0 - 0.1 * count(model), 1.0)
    assert not found.met and found.drop == pytest.approx(9.0 - 2.8) and len(found.excluded) == 28
    flat = recover(blank, RANKED, lambda model: 3.0, 1.0)
    assert not flat.met and flat.excluded == (), "float layers that bring nothing are not kept"
    none = recover(blank, (), lambda model: 3.0, 1.0)
    assert not none.met and none.drop == 3.0 and len(none.trials) == 1


def test_what_is_returned_was_evaluated_even_where_accuracy_is_not_monotone():
    drops = {0: 5.0, 1: 0.9, 2: 4.0, 4: 0.1}
    found = recover(blank, RANKED, lambda model: drops[count(model)], 1.0)
    assert found.met and drops[count(found.model)] == found.drop <= 1.0


def fragile(seed: int = 0) -> ir.Model:
    """Four layers; the third multiplies an input of which one value is 1000 times the others."""
    rng = np.random.default_rng(seed)
    proto = parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[N,8] x) => (float[N,6] y) {
            [one] a = Gemm(x, w1, b1)  r = Relu(a)  [two] c = Gemm(r, w2, b2)
            [three] d = Gemm(c, w3)  s = Relu(d)  [four] y = Gemm(s, w4) }"""
    )
    arrays = {name: rng.standard_normal((8, 8)) / 2 for name in ("w1", "w2", "w3")}
    arrays |= {"w4": rng.standard_normal((8, 6)), "b1": np.ones(8), "b2": np.zeros(8)}
    arrays["w2"][:, 0] *= 1000
    arrays["w3"][0] /= 1000
    for name, array in arrays.items():
        proto.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    return ir.from_proto(proto)


def test_the_layer_that_suffers_is_ranked_first_and_its_return_pays():
    model = fragile()
    data = random_dataset(models.signature(model), 64, 0)

    def build(excluded: tuple[str, ...]) -> ir.Model:
        each = QuantizeInt8(exclude=excluded, calibration="minmax")
        statistics = collect_statistics(model, each.observes(model), data)
        return each.run(model.clone(), Context(x86_for_mcpu("cascadelake"), statistics, data)).model

    layers = quantized_layers(build(()))
    assert layers == ("one", "two", "three", "four")
    ranked = rank_layers(build, layers, model, data, seed=1)
    assert ranked[0].node in ("two", "three") and ranked[0].snr_db < ranked[1].snr_db - 6, ranked
    assert [r.snr_db for r in ranked] == sorted(r.snr_db for r in ranked)
    assert ranked == rank_layers(build, layers, model, data, seed=1), "the same seed ranks the same"

    import onnxruntime

    def noise_db(quantized: ir.Model) -> float:
        x = np.concatenate([feeds["x"] for feeds in data.batches(64)])
        sessions = [
            onnxruntime.InferenceSession(models.to_bytes(m), providers=["CPUExecutionProvider"])
            for m in (model, quantized)
        ]
        wanted, got = (np.asarray(session.run(None, {"x": x})[0]) for session in sessions)
        return float(10 * np.log10(np.square(wanted - got).sum() / np.square(wanted).sum()))

    plain = noise_db(build(()))
    found = recover(build, ranked, noise_db, plain - 6)
    assert found.met and 1 <= len(found.excluded) < 4
    assert set(quantized_layers(found.model)) == set(layers) - set(found.nodes)
