"""What a pass is: a value whose fields are its options."""

from __future__ import annotations

import abc
import enum
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import onnx_ir as ir
from typing_extensions import dataclass_transform

from graphopt import spec
from graphopt.capabilities import Capabilities, host_capabilities
from graphopt.progress import SILENT, Progress

if TYPE_CHECKING:
    from graphopt.calibration import Dataset, TensorStatistics


class Fidelity(enum.IntEnum):
    """How safe a rewrite is."""

    EXACT = 0
    """The same arithmetic; only constant subexpressions are computed earlier."""
    ROUNDING = 1
    """Equal in real numbers; floating-point rounding differs."""
    LOSSY = 2
    """Approximates: judged by signal-to-noise ratio and by accuracy."""


@dataclass(frozen=True)
class Skip:
    """A place where a pass could have applied and did not, and why."""

    node: str
    reason: str


@dataclass(frozen=True)
class PassResult:
    """What a pass did. `model` is the argument, rewritten in place, or a new one."""

    model: ir.Model
    applied: int
    skipped: tuple[Skip, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Context:
    """Everything a pass may know that is not one of its options."""

    capabilities: Capabilities = field(default_factory=host_capabilities)
    statistics: Mapping[str, TensorStatistics] = field(default_factory=dict)
    """By value name, for the values the pass said it `observes`."""
    data: Dataset | None = None
    """The calibration data itself, for passes that reconstruct outputs."""
    original: ir.Model | None = None
    """The model before the first lossy pass, for passes that make up for what others did; None: there was none yet."""
    seed: int = 0
    progress: Progress = SILENT


@dataclass(frozen=True)
class Offer:
    """One thing that a pass could do to one place of a model, for a search that weighs many of them."""

    site: str
    """The place: of the offers for one site at most one can be taken."""
    value: str
    """What the pass's option `Pass.takes` names it by."""
    nodes: tuple[str, ...]
    """Labels of the layers that become cheaper or go away."""
    build: Callable[[], ir.Model]
    """The model with this offer alone taken, in full precision, fitted to the calibration data as far as that is cheap;
    layers in place of node `n` are labelled `n` or `n_...`."""


@dataclass_transform(frozen_default=True)
class Pass(abc.ABC):
    """Base of every rewrite. Subclasses are frozen dataclasses by themselves: annotate fields, give defaults.

    `name` is verb-object, by default the class name in kebab case (FoldBatchNorm -> fold-batch-norm).
    """

    name: ClassVar[str]
    fidelity: ClassVar[Fidelity] = Fidelity.LOSSY
    quantizes: ClassVar[bool] = False
    """Whether it stores layers in fewer bits, but those that its option `exclude` names: accuracy recovery and mixed
    precision return layers to float by it. What other passes exclude, they would treat as another network."""
    takes: ClassVar[str] = ""
    """The option that lists offers to take, where the pass makes offers: it then does these and nothing else."""
    renames: ClassVar[bool] = False
    """Whether it puts layers of other names in place of those that it changes."""

    def __init_subclass__(cls, **keywords):
        super().__init_subclass__(**keywords)
        if "name" not in cls.__dict__:
            cls.name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", cls.__name__).lower()
        dataclass(frozen=True)(cls)

    def observes(self, model: ir.Model) -> tuple[str, ...]:
        """Names of the values whose statistics on calibration data `run` needs; none by default."""
        return ()

    def offers(self, model: ir.Model, context: Context) -> Iterable[Offer]:
        """What `run` could do to `model`, site by site, each site's offers from the mildest on. `model` is not changed.

        Raises what `run` raises.
        """
        return ()

    @abc.abstractmethod
    def run(self, model: ir.Model, context: Context) -> PassResult:
        """Rewrite `model` (the caller's own copy: it may be changed in place). Raises PassError."""

    def __str__(self) -> str:
        return str(spec.unbind(self.name, self))
