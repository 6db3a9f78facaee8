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

import weakref
from collections import Counter
from itertools import pairwise
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphopt.calibration import Dataset
from graphopt.errors import PassError
from graphopt.graph import label, opset_of, remove_unused_initializers
from graphopt.model import digest
from graphopt.passes.base import Context, Fidelity, Pass, PassResult, Skip
from graphopt.passes.excluded import require_nodes
from graphopt.passes.low_rank.choose import Candidate, Goal, Split, affordable, at_rank, choose, fit
from graphopt.passes.low_rank.decomposition import AUTOMATIC, DECOMPOSITIONS
from graphopt.passes.low_rank.inputs import Inputs, has_covariance, observe_inputs
from graphopt.passes.low_rank.metric import Metric
from graphopt.passes.low_rank.problem import Problem, problem_of
from graphopt.passes.low_rank.rewrite import SUFFIX, replace
from graphopt.passes.low_rank.stages import Rank
from graphopt.passes.quantization.placement import LAYERS, UNSUPPORTED_LAYERS, place
from graphopt.shapes.inferred import inferred_shapes

Method = Literal["auto", "svd", "spatial", "tucker2", "cp"]
Found = tuple[Split, np.ndarray | None] | str
"""A split and what the bias gains, (channels,); or why there is none."""
_known: weakref.WeakKeyDictionary[Dataset, dict[tuple, Found]] = weakref.WeakKeyDictionary()


class LowRankSplit(Pass):
    """Layers as products of smaller ones: fewer multiply-accumulates."""

    fidelity = Fidelity.LOSSY

    method: Method = "auto"
    """The decomposition; auto: svd, spatial or tucker2, whichever has the least arithmetic (for `ratio`: error)."""
    fit: Literal["auto", "outputs", "weights"] = "auto"
    """What comes out right: outputs on the calibration data, or weights; auto: outputs where there is data."""
    energy: float = 0.99
    """Share of the energy (of the outputs about their mean, or of the weights) that each layer keeps."""
    ratio: float | None = None
    """Share of each split layer's multiply-accumulates to leave, instead of `energy`."""
    ranks: tuple[str, ...] = ()
    """NODE:RANK, or NODE:INxOUT for tucker2, instead of `energy`; a group's. Other nodes are left alone."""
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
        self._explicit_ranks()

    def run(self, model: ir.Model, context: Context) -> PassResult:
        """Split. Raises PassError: `exclude` or `ranks` names no node, or there is no data to fit outputs on."""
        self._check_names(model)
        if self.fit == "outputs" and context.data is None:
            raise PassError(f"{self.name}: fit=outputs needs calibration data", hint="give --calib DATA, or fit=auto")
        placement = place(model.graph)
        kinds = {label(node): node.op_type for node in model.graph}
        reasons = {s.node: s.reason for s in placement.skipped if kinds[s.node] in LAYERS}
        reasons |= {name: f"{kind} is not split" for name, kind in kinds.items() if kind in UNSUPPORTED_LAYERS}
        goal = Goal(self.energy, self.ratio, self.block or context.capabilities.channel_block, self.min_saving)
        shapes = inferred_shapes(model)
        chances: dict[Problem, list[list[Candidate]]] = {}
        for layer in placement.layers:
            name = label(layer.node)
            if self.ranks and name not in self._explicit_ranks():
                continue
            problem = problem_of(layer, shapes)
            found = self._candidates(problem, goal, opset_of(model))
            if isinstance(found, str):
                reasons[name] = found
            else:
                chances[problem] = found
        done: list[tuple[Problem, Split]] = []
        first = model.clone() if self._fits_outputs(context) and self.portions > 1 else model
        for portion in _portions(list(chances), self.portions):
            part = {problem: chances[problem] for problem in portion}
            for problem, found in self._splits(first, model if done else first, part, goal, context).items():
                if isinstance(found, str):
                    reasons[label(problem.layer.node)] = found
                    continue
                split, shift = found
                replace(model, problem, split, shift)
                done.append((problem, split))
        reasons |= {name: "excluded by name" for name in self.exclude if name in kinds}
        remove_unused_initializers(model.graph)
        skipped = tuple(Skip(name, reasons[name]) for name in kinds if name in reasons)
        outputs = self._fits_outputs(context)
        return PassResult(model, len(done), skipped, _notes(done, outputs))

    def _fits_outputs(self, context: Context) -> bool:
        return self.fit != "weights" and context.data is not None

    def _candidates(self, problem: Problem, goal: Goal, opset: int) -> list[list[Candidate]] | str:
        """By decomposition, those worth fitting; or why there are none."""
        if problem.layer.node.op_type == "Gemm" and opset < 7:
            return f"a Gemm of opset {opset} may broadcast its bias in ways of its own"
        given = self._explicit_ranks().get(label(problem.layer.node))
        if given is not None:
            return self._at(problem, given, goal)
        methods = AUTOMATIC if self.method == "auto" else (self.method,)
        found = {name: affordable(problem, DECOMPOSITIONS[name], goal) for name in methods}
        usable = [each for each in found.values() if not isinstance(each, str)]
        # `auto` always has svd, which no layer is refused for its form: its reason says most.
        return usable or str(found[methods[0]])

    def _at(self, problem: Problem, rank: Rank, goal: Goal) -> list[list[Candidate]] | str:
        pointwise = np.prod(problem.shape.kernel, dtype=int) == 1
        automatic = "tucker2" if len(rank) == 2 else "svd" if pointwise or len(problem.shape.kernel) != 2 else "spatial"
        decomposition = DECOMPOSITIONS[automatic if self.method == "auto" else self.method]
        refusal = decomposition.refuses(problem.shape)
        if refusal is not None:
            return refusal
        full = decomposition.full(problem.shape)
        if len(rank) != len(full):
            return f"{decomposition.NAME} has {len(full)} rank{'s' if len(full) > 1 else ''}, {len(rank)} given"
        candidate = at_rank(problem, decomposition, tuple(min(a, b) for a, b in zip(rank, full, strict=True)))
        if candidate.macs * goal.min_saving > problem.macs:
            saving = problem.macs / candidate.macs
            return f"rank {_text(rank)} makes it {saving:.2f} times less arithmetic, {goal.min_saving:g} is asked for"
        return [[candidate]]

    def _splits(
        self,
        first: ir.Model,
        model: ir.Model,
        chances: dict[Problem, list[list[Candidate]]],
        goal: Goal,
        context: Context,
    ) -> dict[Problem, Found]:
        """What becomes of each layer, with earlier ones split in `model` and not in `first`.

        Nothing is fitted twice, and what is excluded changes nothing for the layers before it.
        """
        wanted = [problem for problem in chances if label(problem.layer.node) not in self.exclude]
        if not self._fits_outputs(context):
            found: dict[Problem, Found] = {}
            with context.progress.task("split weights", len(wanted)) as advance:
                for problem in wanted:
                    plain = [Metric()] * problem.groups
                    split = self._split(problem, chances[problem], plain, goal, context.seed)
                    found[problem] = split if isinstance(split, str) else (split, None)
                    advance(1)
            return found
        assert context.data is not None
        known = _known.setdefault(context.data, {})
        options = (digest(first), digest(model), context.seed, self.method, self.portions, goal, self.ranks)
        keys = {problem: (*options, label(problem.layer.node)) for problem in chances}
        if all(keys[problem] in known for problem in wanted):
            return {problem: known[keys[problem]] for problem in wanted}
        # All layers are observed whatever is excluded: which positions are drawn depends on which layers are.
        second = None if model is first else model
        for problem, inputs in observe_inputs(first, second, list(chances), context):
            if problem in wanted and keys[problem] not in known:
                target = problem.seeing(inputs)
                split = self._split(target, chances[problem], inputs.metrics, goal, context.seed)
                done = split if isinstance(split, str) else (split, _shift(problem, split, inputs))
                known[keys[problem]] = done
        return {problem: known[keys[problem]] for problem in wanted}

    def _split(
        self, problem: Problem, candidates: list[list[Candidate]], metrics: list[Metric], goal: Goal, seed: int
    ) -> Split | str:
        if self.ranks:
            return fit(problem, candidates[0][0], metrics, seed)
        return choose(problem, candidates, metrics, goal, seed)

    def _explicit_ranks(self) -> dict[str, Rank]:
        found: dict[str, Rank] = {}
        for text in self.ranks:
            node, _, rank = text.rpartition(":")
            numbers = rank.split("x")
            if not node or len(numbers) > 2 or not all(number.isdigit() and int(number) > 0 for number in numbers):
                raise ValueError(f"ranks: {text!r} is not NODE:RANK or NODE:INxOUT")
            found[node] = tuple(int(number) for number in numbers)
        return found

    def _check_names(self, model: ir.Model) -> None:
        names = [label(node) for node in model.graph]
        # A later pass may be told to leave a layer alone that this one makes: such a name is none of ours.
        made = {name for name in self.exclude if SUFFIX in name and name.rpartition(SUFFIX)[0] in names}
        for option, given in (("exclude", self.exclude), ("ranks", tuple(self._explicit_ranks()))):
            require_nodes(model, [name for name in given if name not in made], self.name, option)


def _portions(problems: list[Problem], count: int) -> list[list[Problem]]:
    """Runs of neighbours, in graph order."""
    bounds = np.linspace(0, len(problems), min(count, len(problems)) + 1).astype(int)
    return [problems[a:b] for a, b in pairwise(bounds)]


def _shift(problem: Problem, split: Split, inputs: Inputs) -> np.ndarray:
    """What the outputs would lose of their mean, (channels,)."""
    size = (problem.groups, problem.shape.outputs, -1)
    whole = np.einsum("got,gt->go", problem.weights.reshape(size), inputs.first_means)
    return (whole - np.einsum("got,gt->go", split.product().reshape(size), inputs.means)).reshape(-1)


def _text(rank: Rank) -> str:
    return "x".join(map(str, rank))


def _notes(done: list[tuple[Problem, Split]], outputs: bool) -> tuple[str, ...]:
    if not done:
        return ()
    methods = Counter(split.method for _, split in done)
    listed = ", ".join(f"{count} by {method}" for method, count in sorted(methods.items()))
    kept = 1 - max(split.lost for _, split in done)
    what = "outputs" if outputs else "weights"
    notes = [f"{len(done)} layers split ({listed}); each keeps {100 * kept:.2f} % or more of the energy of its {what}"]
    plain = [label(p.layer.node) for p, _ in done if outputs and not has_covariance(p)]
    if plain:
        notes.append(f"too large for a covariance, fitted to weights: {', '.join(plain)}")
    return tuple(notes)
