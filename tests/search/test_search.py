"""The preset `auto` from end to end: what it finds is right, noted, resumed, drawn, and can be made again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import graphopt
from graphopt import model as models
from graphopt.cli import group
from graphopt.errors import GraphoptError, SpecError
from graphopt.report.front import front_plot, pareto
from graphopt.search.explore import Search
from graphopt.settings import read_pick, read_recipe

DIGITS = Path(__file__).resolve().parent.parent.parent / "examples" / "digits"
FAST = {"tune_seconds": 0.0, "measure_seconds": 1.0, "threads": 1, "search_seconds": 600.0}
DATA = {"calib": DIGITS / "calib.npz", "eval": DIGITS / "eval.npz"}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("search")


@pytest.fixture(scope="module")
def found(home):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRAPHOPT_CACHE", str(home / "cache"))
        return graphopt.optimize(DIGITS / "digits.onnx", home / "out", preset="auto", max_drop=1.0, **DATA, **FAST)


def test_the_search_weighs_every_kind_of_choice_and_tries_whole_models(found):
    search = found.report.search
    assert search is not None and search.objective == "latency" and search.plain_cost > 0
    assert {offer.pass_name for offer in search.offers} >= {"prune-channels", "low-rank-split"}
    assert all(offer.cost < 1.0 for offer in search.offers)
    assert all(offer.agreement is not None and 0 <= offer.agreement <= 100 for offer in search.offers)
    assert search.trials and all(trial.cost < search.plain_cost for trial in search.trials)
    timed = [layer for layer in search.layers if layer.points]
    assert timed and all(seconds > 0 for layer in timed for _, _, seconds in layer.points)


def test_what_is_delivered_keeps_the_bound_and_is_no_slower_than_plain_int8(found):
    report = found.report
    chosen = report.chosen()
    assert chosen is not None and report.accuracy_met
    assert report.variant(chosen.variant).drop <= 1.0
    plain = next(c for c in report.candidates if c.name == "final · tvm")
    assert chosen.latency["median_s"] <= 1.05 * plain.latency["median_s"]
    for variant in report.variants:
        if variant.name.startswith("auto"):
            assert variant.within_bound and variant.drop <= 1.0


@pytest.mark.long
def test_the_front_is_written_and_each_point_can_be_made_again(found, home, monkeypatch):
    monkeypatch.setenv("GRAPHOPT_CACHE", str(home / "cache"))
    front = json.loads((home / "out" / "pareto.json").read_text())
    points = front["points"]
    assert [p["number"] for p in points] == list(range(len(points))) and len(points) >= 3
    costs = [p["latency_s"] for p in points]
    assert costs == sorted(costs)
    best = -1.0
    for point in points:
        assert point["on_front"] == (point["accuracy"] > best)
        best = max(best, point["accuracy"])
    assert (home / "out" / "pareto.svg").read_text().startswith("<svg")
    assert 'id="front"' in (home / "out" / "report.html").read_text()
    known = {v.pipeline: v for v in found.report.variants}
    point = next(p for p in points if p["pipeline"] in known)
    result = CliRunner().invoke(
        group,
        ["optimize", "--config", str(home / "out" / "pareto.json"), "--pick", str(point["number"]), "-o",
         str(home / "picked"), "--format", "json", "-q"],
        standalone_mode=False,
    )  # fmt: skip
    assert result.exception is None, result.output
    report = json.loads((home / "picked" / "report.json").read_text())
    assert report["search"] is None
    again = next(v for v in report["variants"] if v["pipeline"] == point["pipeline"])
    assert again["accuracy"]["value"] == point["accuracy"]


@pytest.mark.long
def test_the_recipe_replays_what_was_delivered_without_a_search(found, home, monkeypatch):
    monkeypatch.setenv("GRAPHOPT_CACHE", str(home / "cache"))
    recipe = read_recipe(home / "out" / "recipe.toml")
    chosen = found.report.chosen()
    assert chosen is not None
    assert recipe["passes"] == found.report.variant(chosen.variant).pipeline and "objective" not in recipe
    again = graphopt.optimize(output=home / "again", **recipe)
    assert again.report.search is None
    name = "final" if len(again.report.variants) > 1 else "exact"
    delivered = models.digest(models.load(home / "out" / "model.onnx"))
    if again.report.choice is not None and again.report.choice.variant == name:
        assert models.digest(models.load(home / "again" / "model.onnx")) == delivered


@pytest.mark.long
def test_a_search_goes_on_where_it_was_interrupted(found, home, monkeypatch):
    monkeypatch.setenv("GRAPHOPT_CACHE", str(home / "cache"))
    (notes,) = (home / "cache" / "searches").iterdir()
    before = notes.read_bytes()
    made: list[str] = []
    plain = Search._variant

    def counted(self, pipeline):
        made.append(str(pipeline))
        return plain(self, pipeline)

    monkeypatch.setattr(Search, "_variant", counted)
    again = graphopt.optimize(DIGITS / "digits.onnx", preset="auto", max_drop=1.0, **DATA, **FAST)
    assert notes.read_bytes() == before  # nothing was measured again
    assert again.report.search is not None and again.report.search.trials
    assert [t.pipeline for t in again.report.search.trials] == [t.pipeline for t in found.report.search.trials]
    assert set(made) <= {t.pipeline for t in found.report.search.trials if t.within_bound}  # only to race


@pytest.mark.long
def test_size_is_an_objective_too(home, monkeypatch):
    monkeypatch.setenv("GRAPHOPT_CACHE", str(home / "cache"))
    result = graphopt.optimize(
        DIGITS / "digits.onnx", preset="auto", objective="size", engine="onnxruntime", **DATA, **FAST
    )
    search = result.report.search
    assert search is not None and search.objective == "size" and not search.layers
    assert "quantize-int4" in {offer.pass_name for offer in search.offers}
    made = [v for v in result.report.variants if v.name.startswith("auto")]
    least = min(made, key=lambda v: v.parameter_bytes)
    assert least.parameter_bytes < 0.7 * result.report.variant("final").parameter_bytes
    assert "quantize-int4{layers=" in least.pipeline and "quantize-int8" in least.pipeline
    chosen = result.report.chosen()
    clear = [c for c in result.report.candidates if c.variant in names(result) and c.speedup and c.speedup[1] >= 1.05]
    assert chosen is not None and all(chosen.size_bytes <= c.size_bytes for c in clear)


def names(result: graphopt.Result) -> set[str]:
    return {variant.name for variant in result.report.variants}


def test_a_front_leaves_out_what_equals_the_input_model():
    """Of outputs that are no classes the signal-to-noise ratio is then infinite, which a report holds as null."""

    def variant(name: str, value: float | None) -> dict:
        accuracy = {"metric": "snr", "value": value, "count": 4}
        return {"name": name, "pipeline": name, "accuracy": accuracy, "drop": 0.0, "within_bound": True,
                "parameter_bytes": 4}  # fmt: skip

    names = {"exact": None, "final": 30.0}
    report = {
        "variants": [variant(name, value) for name, value in names.items()],
        "candidates": [{"variant": name, "latency": {"median_s": 1.0}} for name in names],
        "search": {"objective": "latency", "trials": [], "plain_cost": 1.0},
        "settings": {"max_drop": 1.0},
    }
    front = pareto(report)
    assert front is not None and [point["name"] for point in front["points"]] == ["final"]
    assert front_plot(front).startswith("<svg")


def test_a_search_needs_real_data():
    with pytest.raises(SpecError, match="needs real data"):
        graphopt.optimize(DIGITS / "digits.onnx", preset="auto")
    with pytest.raises(GraphoptError, match="needs real data"):
        graphopt.optimize(DIGITS / "digits.onnx", preset="auto", calib="random")


def test_a_point_that_is_not_there_is_named(tmp_path):
    path = tmp_path / "pareto.json"
    path.write_text(json.dumps({"points": [{"number": 0, "pipeline": "simplify"}], "settings": {"model": "m.onnx"}}))
    assert read_pick(path, 0) == {"model": "m.onnx", "passes": "simplify"}
    with pytest.raises(SpecError, match="has no point 3"):
        read_pick(path, 3)
    path.write_text("{}")
    with pytest.raises(SpecError, match=r"is no pareto\.json"):
        read_pick(path, 0)
    path.write_text(json.dumps({"points": [{"number": 0, "pipeline": "simplify"}], "settings": {"seed": "x"}}))
    with pytest.raises(SpecError, match="seed must be int"):
        read_pick(path, 0)
