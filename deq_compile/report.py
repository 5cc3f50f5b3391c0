"""What was found in a model, what was done with it, and why not.

Every room of the compiler speaks to the user through these types: a candidate that is left alone carries a `Reason`
and the place in the user's file that caused it.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Sequence
from typing import Any


class Reason(enum.Enum):
    """Why a candidate loop was left as it is. The value is the message."""

    RANDOM = "the body draws random numbers (dropout in training, noise), so it is not one fixed map"
    BATCH_NORM = "batch-norm in training updates its statistics in every iteration"
    ASSERTION = "the body asserts something of its values, and a solve does not pass the loop's own iterates"
    MUTATION = "the body writes to a tensor that lives on after it (a buffer, an input, a view)"
    ESCAPES = "an iterate before the last one is used outside the loop (a trajectory, a list of residuals)"
    DRIFT = "the state changes its shape or dtype between iterations"
    HIGHER_ORDER = "an iteration reads iterates older than the last two"
    TOO_SHORT = "fewer repetitions than min_repeats"
    OTHER_INPUT = "each iteration reads a different tensor (other weights, or an input sequence)"
    OTHER_CONSTANT = "a constant changes from iteration to iteration"
    GRAD_MODE = "the body switches gradients on or off, or detaches its state"
    NOT_FLOATING = "the state is not a real floating-point tensor"
    NOT_PLAIN = "the loop works on tensors with insides of their own (torch.func, DTensor, nested or sparse tensors)"
    NON_TENSOR = "the body reads a value from outside that is neither a tensor nor an integer size"
    CONTROL_FLOW = "the body contains a higher-order operator (cond, while_loop, a custom autograd.Function)"
    UNTRACEABLE = "the body could not be executed on fake tensors"
    COUNTER = "a value that tells how many iterations ran, or how the loop ended, is used after it"
    SIDE_EFFECT = "the loop writes to something that outlives an iteration (an attribute, a list, a dict)"
    EXIT_TEST = "the test that ends the loop is no test of how far an iterate is from its image"
    HIDDEN_CAP = "beside its test the loop has an exit that cannot be counted (no range, no integer that grows by equal steps)"
    BRANCH = "a branch in the loop's body depends on data, and a graph holds one way only (torch.where holds both)"
    BROKEN = "the graph ends inside of the loop, so that no compiler sees its iterations together"
    SHARDED = "FSDP2 gathers the parameters of a module around each call that the loop makes of it, and the graph ends there"
    VARYING = "the loop's count is another one at every call, and a graph holds one"
    NESTED_EXIT = "the body holds another loop whose exit depends on data"
    TRAJECTORY = "states before the fixed point are asked for as well (a trajectory)"
    LIBRARY = "the library is asked for something that only its own solver can do"
    SOLVER = "a solver is called whose result cannot be built from a solve of ours"
    TOO_CHEAP = "a solve took longer than so few iterations of so small a body"
    HOOK = "a backward hook stays as it is"
    AUTOGRAD_FUNCTION = "an implicit gradient in a torch.autograd.Function stays outside of the graph, and as it is"
    STATES_KEPT = "several states of the loop are kept for a backward of the user's own, which may go back through its steps"
    NOT_TRACED = "Python ran this function, outside of every graph, so that no compiler saw its loop"
    UNEXPECTED = "an exception that nobody foresaw; the code is compiled as it is"
    NOT_CAUGHT = "the call was marked as a fixed point, but the graph was cut inside of it"


@dataclasses.dataclass(frozen=True)
class Location:
    """A line of the user's code. `file` is empty where the tracer left no trace."""

    file: str = ""
    line: int = 0
    function: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.file else "<unknown>"


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A candidate that was left alone."""

    reason: Reason
    location: Location
    detail: str = ""
    repeats: int = 0

    def __str__(self) -> str:
        what = f" ({self.detail})" if self.detail else ""
        return f"{self.location}: {self.reason.name}, {self.reason.value}{what}"


@dataclasses.dataclass
class Standing:
    """What a region's calls have decided and measured so far. The region writes it, reports ask it.

    `status` is "solve" (a Broyden or Picard solve stands in
    for the loop), "follow" (the body has several fixed points: the loop's own iterates are followed to where they converge),
    "kept" (the loop's own iterations are run) or "pending" (not called yet, so not verified); `distance` is
    the last measured max over samples of |z_N - z*| / |z*|, None before a verification or where none is asked for. `engine` is
    what the iterations ran on at the last call ("loop", "chunks", "while"; see region/engine), `engine_reason` why on nothing
    better. `reuse` tells whether the backward makes use of the forward's factors, `gradient_error` how far its gradients of the
    operands were off when last measured, relative to those at a tenth of the tolerance. `recycle` says in words what begins with
    factors of earlier batches; empty where the option is off. `kept_reason` says why a loop is kept,
    `counts` from which count on it is solved, where the count is an input.
    """

    status: str = "pending"
    distance: float | None = None
    engine: str = "loop"
    engine_reason: str = ""
    gradient_error: float | None = None
    reuse: bool = True
    recycle: str = ""
    chosen: str = ""
    kept_reason: str = ""
    counts: str = ""


@dataclasses.dataclass
class Region:
    """A fixed-point region that was replaced by one solve.

    `hoisted` names the operations that were moved out of the loop. `iterations` is the count of a fixed-count loop, None where
    a fixed point was declared or the count is an input. `notes` say in words what was done, and where the meaning differs from
    what the user's code would have done. `standing` is what its calls have found since; each of its
    fields is an attribute of the region too.
    """

    key: str
    kind: str
    location: Location
    states: tuple[tuple[tuple[str, ...], str], ...]
    iterations: int | None
    operands: int
    hoisted: tuple[str, ...]
    solver: str
    backward: str
    notes: tuple[str, ...] = ()
    standing: Standing = dataclasses.field(default_factory=Standing)

    @property
    def status(self) -> str:
        return self.standing.status

    @property
    def distance(self) -> float | None:
        return self.standing.distance

    @property
    def engine(self) -> str:
        return self.standing.engine

    @property
    def engine_reason(self) -> str:
        return self.standing.engine_reason

    @property
    def gradient_error(self) -> float | None:
        return self.standing.gradient_error

    @property
    def reuse(self) -> bool:
        return self.standing.reuse

    @property
    def recycle(self) -> str:
        return self.standing.recycle

    @property
    def chosen(self) -> str:
        return self.standing.chosen

    @property
    def kept_reason(self) -> str:
        return self.standing.kept_reason

    @property
    def counts(self) -> str:
        return self.standing.counts


@dataclasses.dataclass
class Report:
    """Everything the compiler did to one model: regions, skipped candidates, graphs seen, seconds spent in each pass, and
    Dynamo's graph breaks and the features of capture that this torch's Dynamo does not allow (only `explain` collects those)."""

    regions: list[Region] = dataclasses.field(default_factory=list)
    skipped: list[Skipped] = dataclasses.field(default_factory=list)
    graphs: int = 0
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    graph_breaks: list[str] = dataclasses.field(default_factory=list)
    features_off: dict[str, str] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        """The report as a JSON object (string)."""

        def plain(value: Any) -> Any:
            if isinstance(value, enum.Enum):
                return value.name
            return value

        def as_dict(items: Sequence[tuple[str, Any]]) -> dict[str, Any]:
            return {key: plain(value) for key, value in items}

        whole = dataclasses.asdict(self, dict_factory=as_dict)
        whole["regions"] = [{**row, **row.pop("standing")} for row in whole["regions"]]
        return json.dumps(whole, indent=2)

    def to_html(self) -> str:
        """The report as a piece of HTML that needs nothing from elsewhere (string): what `str` says, everything escaped."""
        from .report_html import html_of

        return html_of(self)

    def _repr_html_(self) -> str:
        """What notebooks show."""
        return self.to_html()

    def rows(self) -> list[tuple[str, ...]]:
        """The table of regions, its head first."""
        rows: list[tuple[str, ...]] = [("status", "kind", "where", "state", "iterations", "hoisted", "solver", "backward")]
        for r in self.regions:
            status = r.status if r.distance is None else f"{r.status} ({r.distance:.1e})"
            state = " ".join(f"{dtype}[{','.join(shape)}]" for shape, dtype in r.states)
            count = "-" if r.iterations is None else str(r.iterations)
            rows.append((status, r.kind, str(r.location), state, count, str(len(r.hoisted)), r.solver, r.backward))
        return rows

    def __str__(self) -> str:
        rows = self.rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*(table if self.regions else ()), *self.remarks()])

    def remarks(self) -> list[str]:
        """What is said below the table, a line each."""
        lines = []
        if not self.regions:
            lines = [f"no fixed-point region in {self.graphs} graph(s)"]
            if not (self.skipped or self.graph_breaks or self.features_off):
                lines.append("no loop that repeats a map was met, and no call of a solver")
        lines += [f"kept        {r.location}: {r.kept_reason}" for r in self.regions if r.kept_reason]
        lines += [f"counts      {r.location}: {r.counts}" for r in self.regions if r.counts]
        lines += [f"engine      {r.location}: {r.engine}, since {r.engine_reason}" for r in self.regions if r.engine_reason]
        lines += [f"solver      {r.location}: {r.chosen}" for r in self.regions if r.chosen and not r.kept_reason]
        idle = "without the forward's factors, which cost more than they save"
        lines += [f"backward    {r.location}: {idle}" for r in self.regions if not r.reuse]
        lines += [f"recycled    {r.location}: factors of earlier batches serve {r.recycle}" for r in self.regions if r.recycle]
        lines += [
            f"gradient    {r.location}: off by {r.gradient_error:.0e}, against a tenth of the adjoint's tolerance"
            for r in self.regions
            if r.gradient_error is not None
        ]
        lines += [f"{r.location}: {note}" for r in self.regions for note in r.notes]
        lines += [f"left alone  {skipped}" for skipped in self.skipped]
        lines += [f"off         {feature}: {why}" for feature, why in self.features_off.items()]
        lines += [f"graph break {' '.join(text.split())}" for text in self.graph_breaks]
        return lines
