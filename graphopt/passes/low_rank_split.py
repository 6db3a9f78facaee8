"""Split layers into thinner ones behind one another, fitted to the outputs on calibration data.

Equation
    y = W x + b  ~  W_n ... W_1 x + b',   |W - W_n ... W_1|_K least,   |E|_K^2 = tr(E K E'),   b' = b + (W - W_n..W_1) m
    m, K: mean and covariance of the layer's inputs on the calibration data (for a convolution, of its patches), so that
    |E|_K^2 is the energy of the error of the outputs, and b' takes back its mean. Without data m = 0, K = I.
    Behind layers that are already split the input is x', not x: W gives way to W R, the weights that come nearest to
    W x on x' (R the regression of x on x'), m and K are those of x', and b' = b + W m - W_n..W_1 m'.

Cases
    1. svd: the layer with r outputs, then all outputs from these (1x1 for a Conv): Gemm, MatMul, Conv of any kernel.
    2. spatial: kH x kW as kH x 1, then 1 x kW.
    3. tucker2: 1x1 to fewer channels, the kernel on these, 1x1.
    4. cp: 1x1, one depthwise line along each axis, 1x1.
    `auto` takes the best of the first three. Groups are split each by itself, into layers with as many groups. Strides,
    dilations and padding stay on the layer that has the kernel along that axis. What follows the layer is not touched.

Applies when
    Conv, Gemm, and MatMul with constant float32 weights, where a split has at least `min_saving` times fewer
    multiply-accumulates. Ranks are multiples of the target's channel block. The rank is the smallest that keeps
    `energy`; or the largest with at most `ratio` of the layer's arithmetic; or as `ranks` says, for the nodes it names.

Refuses when
    weights are computed, open to a caller, not float32 or not finite; a bias is not constant; the operator is a
    transposed convolution or recurrent; the layer has no such form (a spatial split of a 1x1 or one-dimensional
    kernel); no rank saves enough, or none that does keeps the energy; the node is excluded.

Few samples
    A covariance of fewer rows than taps has directions without variance, in which a fit would be free: K is mixed with
    the identity, as much as the number of rows asks for (low_rank/metric.py). A layer of more than 2304 taps a group
    gets no covariance and is fitted to its weights.

Defaults
    Measured with benchmarks/low_rank.py, which sets arithmetic against top-1. `portions`: of ResNet-20 at half its
    arithmetic (block=8, ratio=0.65), one portion loses 10 points of top-1, 16 lose 4, and one for each layer 2; each
    costs a run over the data. `energy` is careful: ResNets bear 0.96, MobileNetV2, whose expanded channels are mostly
    clipped away, hardly anything. `ratio` is blind to layers that are narrow already: Tiny Darknet is lost at 0.8.

Fidelity
    LOSSY.

Reference
    Jaderberg et al., BMVC 2014 (spatial); Kim et al., ICLR 2016 (Tucker-2); Lebedev et al., ICLR 2015 (CP); Zhang et
    al., "Accelerating Very Deep Convolutional Networks for Classification and Detection", TPAMI 2016 (svd of a Conv;
    fitting outputs, and on inputs that earlier layers changed); Denton et al., "Exploiting Linear Structure Within
    Convolutional Networks for Efficient Evaluation", NIPS 2014 (a metric from the data).
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphopt.calibration import Dataset
from graphopt.errors import PassError
from graphopt.graph import label, opset_of, remove_unused_initializers
from graphopt.model import digest
from graphopt.passes.base import Context, Fidelity, Offer, Pass, PassResult, Skip
from graphopt.passes.excluded import require_nodes
from graphopt.passes.low_rank.choose import NOTHING_TO_KEEP, Candidate, Fitter, Goal, Split, affordable, choose
from graphopt.passes.low_rank.decomposition import AUTOMATIC, DECOMPOSITIONS
from graphopt.passes.low_rank.explicit import Named, candidate_of, parse, text_of
from graphopt.passes.low_rank.first_rows import FirstRows
from graphopt.passes.low_rank.inputs import Inputs, mean_lost, observe_inputs
from graphopt.passes.low_rank.menu import menu
from graphopt.passes.low_rank.metric import Metric
from graphopt.passes.low_rank.notes import notes_on
from graphopt.passes.low_rank.problem import Problem, problem_of
from graphopt.passes.low_rank.rewrite import SUFFIX, copy_with_split, replace
from graphopt.passes.quantization.placement import LAYERS, UNSUPPORTED_LAYERS, place
from graphopt.shapes.inferred import inferred_shapes

Method = Literal["auto", "svd", "spatial", "tucker2", "cp"]
Found = tuple[Split, np.ndarray | None] | str
"""A split and what the bias gains, (channels,); or why there is none."""
_known: weakref.WeakKeyDictionary[Dataset, dict[tuple, Found]] = weakref.WeakKeyDictionary()


class LowRankSplit(Pass):
    """Layers as products of smaller ones: fewer multiply-accumulates."""

    fidelity = Fidelity.LOSSY
    takes = "ranks"
    renames = True

    method: Method = "auto"
    """The decomposition; auto: svd, spatial or tucker2, whichever has the least arithmetic (for `ratio`: error)."""
    fit: Literal["auto", "outputs", "weights"] = "auto"
    """What comes out right: outputs on the calibration data, or weights; auto: outputs where there is data."""
    energy: float = 0.99
    """Share of the energy (of the outputs about their mean, or of the weights) that each layer keeps."""
    ratio: float | None = None
    """Share of each split layer's multiply-accumulates to leave, instead of `energy`."""
    ranks: tuple[str, ...] = ()
    """NODE:METHOD:RANK, instead of `energy`: a group's rank, INxOUT for tucker2. Other nodes are left alone.

    NODE:RANK takes `method`; for auto: tucker2 for INxOUT, spatial for a two-dimensional kernel, else svd."""
    block: int | None = None
    """Ranks are multiples of this many channels; none: the target's channel block."""
    min_saving: float = 1.25
    """Multiply-accumulates before over after that a split must reach."""
    portions: int = 16
    """Fitted to outputs, layers are split in so many steps, each making up for the error that those before it left."""
    exclude: tuple[str, ...] = ()
    """Names of nodes to leave whole (of a nameless node: its first output)."""

    def __post_init__(self) -> None:
        if not 0.0 < self.energy < 1.0:
            raise ValueError(f"energy must be between 0 and 1, not {self.energy:g}")
        if self.ratio is not None and not 0.0 < self.ratio < 1.0:
            raise ValueError(f"ratio must be between 0 and 1, not {self.ratio:g}")
        if self.block is not None and self.block < 1:
            raise ValueError(f"block must be positive, not {self.block}")
        if not self.min_saving > 0.0:
            raise ValueError(f"min_saving must be positive, not {self.min_saving:g}")
        if self.portions < 1:
            raise ValueError(f"portions must be positive, not {self.portions}")
        parse(self.ranks)

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """Split. Raises PassError: `exclude` or `ranks` names no node, or there is no data to fit outputs on."""
        self._check(model, context)
        problems, reasons = self._problems(model)
        kinds = [label(node) for node in model.graph]
        goal = self._goal(context)
        chances: dict[Problem, list[list[Candidate]]] = {}
        named = parse(self.ranks)
        for problem in problems:
            name = label(problem.layer.node)
            if named and name not in named:
                continue
            found = self._candidates(problem, named.get(name), goal, opset_of(model))
            if isinstance(found, str):
                reasons[name] = found
            else:
                chances[problem] = found
        done: list[tuple[Problem, Split]] = []
        first = model.clone() if self._fits_outputs(context) and self.portions > 1 else model
        portions = _portions(list(chances), self.portions)
        before = FirstRows(first, portions, context) if self._fits_outputs(context) and len(portions) > 1 else None
        for portion in portions:
            # With all that could be named: engines may fuse otherwise where other values are watched, and what is
            # fitted is to be, to the last bit, what it was for an offer.
            observed = problems if named and self.portions == 1 else portion
            part = {problem: chances[problem] for problem in portion}
            found = self._splits(first, model if done else first, part, observed, before, goal, context)
            for problem, outcome in found.items():
                if isinstance(outcome, str):
                    reasons[label(problem.layer.node)] = outcome
                    continue
                split, shift = outcome
                replace(model, problem, split, shift)
                done.append((problem, split))
        reasons |= {name: "excluded by name" for name in self.exclude if name in kinds}
        remove_unused_initializers(model.graph)
        skipped = tuple(Skip(name, reasons[name]) for name in kinds if name in reasons)
        outputs = self._fits_outputs(context)
        return PassResult(model, len(done), skipped, notes_on(done, outputs))

    def offers(self, model: ir.Model, context: Context) -> Iterator[Offer]:
        """For each layer that is not excluded up to 5 splits, at `min_saving` down to a quarter of the arithmetic.

        Each is svd, spatial or tucker2 (or `method`), whichever loses least before it is fitted; `energy`, `ratio`
        and `ranks` say nothing here. All layers are observed on the data in one go, and a split is fitted when its
        offer is built. `run` with one offer in `ranks` and portions=1 makes the same model. Raises what `run` raises.
        """
        self._check(model, context)
        problems, _ = self._problems(model)
        goal = dataclasses.replace(self._goal(context), ratio=None)
        chances: dict[Problem, list[list[Candidate]]] = {}
        for problem in problems:
            found = self._candidates(problem, None, goal, opset_of(model))
            if not isinstance(found, str) and label(problem.layer.node) not in self.exclude:
                chances[problem] = found
        if not chances:
            return
        for problem, inputs in self._inputs(model, None, problems, context):
            if problem not in chances:
                continue
            name = label(problem.layer.node)
            fitter = Fitter(problem, inputs.metrics if inputs else _plain(problem), context.seed)
            for each in menu(fitter, chances[problem], goal):
                value = f"{name}:{each.decomposition.NAME}:{text_of(each.rank)}"
                yield Offer(name, value, (name,), partial(_taken, model, fitter, each, inputs))

    def _problems(self, model: ir.Model) -> tuple[list[Problem], dict[str, str]]:
        """The layers, in graph order, and why others are none, by node."""
        placement = place(model.graph)
        kinds = {label(node): node.op_type for node in model.graph}
        reasons = {s.node: s.reason for s in placement.skipped if kinds[s.node] in LAYERS}
        reasons |= {name: f"{kind} is not split" for name, kind in kinds.items() if kind in UNSUPPORTED_LAYERS}
        shapes = inferred_shapes(model)
        return [problem_of(layer, shapes) for layer in placement.layers], reasons

    def _goal(self, context: Context) -> Goal:
        return Goal(self.energy, self.ratio, self.block or context.capabilities.channel_block, self.min_saving)

    def _fits_outputs(self, context: Context) -> bool:
        return self.fit != "weights" and context.data is not None

    def _inputs(
        self, first: ir.Model, second: ir.Model | None, problems: list[Problem], context: Context
    ) -> Iterator[tuple[Problem, Inputs | None]]:
        """What each layer is fitted on; None: its weights alone."""
        if self._fits_outputs(context):
            yield from observe_inputs(first, second, problems, context)
        else:
            yield from ((problem, None) for problem in problems)

    def _candidates(self, problem: Problem, named: Named | None, goal: Goal, opset: int) -> list[list[Candidate]] | str:
        """By decomposition, those worth fitting; or why there are none."""
        if problem.layer.node.op_type == "Gemm" and opset < 7:
            return f"a Gemm of opset {opset} may broadcast its bias in ways of its own"
        if named is not None:
            candidate = candidate_of(problem, named, self.method, goal)
            return candidate if isinstance(candidate, str) else [[candidate]]
        methods = AUTOMATIC if self.method == "auto" else (self.method,)
        found = {name: affordable(problem, DECOMPOSITIONS[name], goal) for name in methods}
        usable = [each for each in found.values() if not isinstance(each, str)]
        # `auto` always has svd, which no layer is refused for its form: its reason says most.
        return usable or str(found[methods[0]])

    def _splits(
        self,
        first: ir.Model,
        model: ir.Model,
        chances: dict[Problem, list[list[Candidate]]],
        observed: list[Problem],
        before: FirstRows | None,
        goal: Goal,
        context: Context,
    ) -> dict[Problem, Found]:
        """What becomes of each layer, with earlier ones split in `model` and not in `first`.

        `observed`: those of `chances`, and more that are to be looked at along with them. Nothing is fitted twice, and
        what is excluded changes nothing for the layers before it.
        """
        wanted = [problem for problem in chances if label(problem.layer.node) not in self.exclude]
        if not self._fits_outputs(context):
            found: dict[Problem, Found] = {}
            with context.progress.task("split weights", len(wanted)) as advance:
                for problem in wanted:
                    split = self._split(problem, chances[problem], _plain(problem), goal, context.seed)
                    found[problem] = split if isinstance(split, str) else (split, None)
                    advance(1)
            return found
        assert context.data is not None
        known = _known.setdefault(context.data, {})
        options = (digest(first), digest(model), context.seed, self.method, self.portions, goal, self.ranks)
        keys = {problem: (*options, label(problem.layer.node)) for problem in chances}
        if all(keys[problem] in known for problem in wanted):
            return {problem: known[keys[problem]] for problem in wanted}
        # All layers are observed whatever is excluded: engines may fuse otherwise where other values are watched.
        second = None if model is first else model
        seen = observe_inputs(first, second, observed, context) if before is None else before.observe(second, observed)
        for problem, inputs in seen:
            if problem in wanted and keys[problem] not in known:
                target = problem.seeing(inputs)
                split = self._split(target, chances[problem], inputs.metrics, goal, context.seed)
                done = split if isinstance(split, str) else (split, mean_lost(problem, split, inputs))
                known[keys[problem]] = done
        return {problem: known[keys[problem]] for problem in wanted}

    def _split(
        self, problem: Problem, candidates: list[list[Candidate]], metrics: list[Metric], goal: Goal, seed: int
    ) -> Split | str:
        fitter = Fitter(problem, metrics, seed)
        if not self.ranks:
            return choose(fitter, candidates, goal)
        return fitter.fit(candidates[0][0]) if fitter.energy > 0 else NOTHING_TO_KEEP

    def _check(self, model: ir.Model, context: Context) -> None:
        names = [label(node) for node in model.graph]
        # A later pass may be told to leave a layer alone that this one makes: such a name is none of ours.
        made = {name for name in self.exclude if SUFFIX in name and name.rpartition(SUFFIX)[0] in names}
        for option, given in (("exclude", self.exclude), ("ranks", tuple(parse(self.ranks)))):
            require_nodes(model, [name for name in given if name not in made], self.name, option)
        if self.fit == "outputs" and context.data is None:
            raise PassError(f"{self.name}: fit=outputs needs calibration data", hint="give --calib DATA, or fit=auto")


def _taken(model: ir.Model, fitter: Fitter, candidate: Candidate, inputs: Inputs | None) -> ir.Model:
    """The model with this split alone."""
    split = fitter.fit(candidate)
    shift = None if inputs is None else mean_lost(fitter.problem, split, inputs)
    return copy_with_split(model, fitter.problem, split, shift)


def _plain(problem: Problem) -> list[Metric]:
    """Metrics for a fit to the weights."""
    return [Metric()] * problem.groups


def _portions(problems: list[Problem], count: int) -> list[list[Problem]]:
    """Runs of neighbours, in graph order."""
    bounds = np.linspace(0, len(problems), min(count, len(problems)) + 1).astype(int)
    return [problems[a:b] for a, b in pairwise(bounds)]
