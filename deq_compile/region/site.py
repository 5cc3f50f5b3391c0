"""One region of one compiled model: what it computes, what has been decided about it, and the process-wide registry.

Compiled bodies are shared by hash (`body.py`); verdicts and counters belong to a site. The key of a site is a string that
is the same in every process that compiles the same models in the same order, so that graph caches hit across processes.
Compiled code knows only the key. So the registry is weak, and a site belongs to what lives as long as the code: the rewritten
graph and the compiled callable (`own`), and each autograd graph that will run the region's backward (its ticket).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from deq_compile.config import Config
from deq_compile.report import Standing
from deq_compile.torch_parts import callable_below

from . import backward as backwards
from . import schedule, why_kept
from .backward import BACKWARDS, of_steps
from .body import BodySpec
from .choice import choice_for
from .counts import Counts, OfCall, due
from .forward import Solution
from .layout import Layout, channels_last, flat_dtype, layout_of
from .pool import Pool
from .solvers import SOLVERS
from .stop import StopTest
from .warm import warm_for
from .worth import WayOut

log = logging.getLogger("deq_compile.region")

# Part of every key. Inductor caches graphs on disk by the text of our node: code cached by an earlier version of this
# package expects that version's outputs. To be raised with every change of the operators' outputs.
OUTPUT_FORMAT = 6
FIRST_STEPS = 16  # that a first solve makes room for
MISSES_BEFORE_KEPT = 3  # consecutive solves of a fixed-count loop that miss the tolerance


@dataclasses.dataclass(frozen=True)
class RegionSpec:
    """What a region computes; nothing in it changes.

    body        the body and how it is run
    dtypes      of the state tensors
    orders      memory order of each state tensor that the region returns
    iterations  N of the user's fixed-count loop; None where a fixed point was declared
    grad        whether gradients are recorded through it
    config      settled options
    stop        the user's own tests, any of which ends the solve in place of `config.tol`
    own_tests   the tests that end the user's own loop; `stop` is empty where an explicit tolerance beats them
    where       the user's file and line, for messages
    needs       which operands want a gradient, as far as the graph tells; None: not known
    channels_last  whether images are iterated on, and given to the body, with their channels fastest in memory
    own_cap     the most iterations that the user's own loop makes, where a test ends it; None where there is no such loop
    start_grad  whether the initial state needs a gradient
    start_trained  whether something that needs a gradient goes into the initial state alone
    attached    whether the user's code applies the body once more to what the solver gives: the result is f(z) then
    solver_call  whether the user calls a solver, or a library's, that has an iteration of its own
    outside     of a loop whose count comes with each call, last among the sizes: how many of its iterations are not the region's;
                `iterations` then are those of one call. None where the count does not come with the call
    suspect     whether the model's input reaches the loop through its initial state alone: the fixed point then depends on that,
                so there are several
    """

    body: BodySpec
    dtypes: tuple[torch.dtype, ...]
    orders: tuple[tuple[int, ...], ...]
    iterations: int | None
    grad: bool
    config: Config
    where: str = "<unknown>"
    needs: tuple[bool, ...] | None = None
    stop: tuple[StopTest, ...] = ()
    own_tests: tuple[StopTest, ...] = ()
    own_cap: int | None = None
    channels_last: bool = False
    start_grad: bool = False
    start_trained: bool = False
    attached: bool = False
    solver_call: bool = False
    suspect: bool = False
    outside: int | None = None

    @functools.cached_property
    def stores_steps(self) -> bool:
        """Whether the forward leaves factors for the backward."""
        config = self.config
        used = SOLVERS[config.solver].leaves_factors and BACKWARDS[config.backward].wants_factors
        return self.grad and used and config.reuse != "never"

    @functools.cached_property
    def own_loop_cap(self) -> int | None:
        """The most iterations of the user's own loop, whose result is the one to give; None where there is no such loop, or where
        the user means the fixed point whatever the loop gives."""
        if self.config.semantics == "equilibrium":
            return None
        return self.iterations if self.iterations is not None else self.own_cap

    @functools.cached_property
    def only_start_differs(self) -> bool:
        """Whether the initial state alone needs a gradient: that of a fixed point is zero, that of the loop is not."""
        return self.grad and self.needs is not None and not any(self.needs) and self.own_loop_cap is not None

    @functools.cached_property
    def start_decides(self) -> bool:
        """Whether the gradient asks where the loop began: that of the fixed point is blind to it, and where there are several the
        start says which one it is, with a gradient that grows without bound between two of them."""
        return self.grad and self.start_grad and self.own_loop_cap is not None

    @property
    def keeps(self) -> bool:
        """Whether the loop is kept whatever its calls may show."""
        start = self.only_start_differs or (self.suspect and self.start_decides)
        return start or (self.suspect and self.own_loop_cap is not None and of_steps(self.config))

    @property
    def written_out(self) -> bool:
        """Whether the user's iterations stand in the graph, and may be compiled one by one."""
        return self.iterations is not None and not self.own_tests and self.config.loop_memory is None

    @functools.cached_property
    def compute_dtype(self) -> torch.dtype:
        return flat_dtype(self.dtypes)

    @functools.cached_property
    def factor_dtype(self) -> torch.dtype:
        return self.config.factor_dtype or self.compute_dtype

    @functools.cached_property
    def body_eps(self) -> float:
        """Unit round-off of the coarsest state dtype, or of autocast: what the body can resolve."""
        coarse = [torch.finfo(d).eps for d in self.dtypes]
        coarse += [torch.finfo(dtype).eps for _, enabled, dtype in self.body.ambient.autocast if enabled]
        return max(coarse)

    @property
    def fingerprint(self) -> str:
        """The same for equal regions, in every process: body, modes, dtypes, memory orders, count and options."""
        count = self.iterations if self.outside is None else ("n", self.outside)
        tests = [test.key for test in self.stop], [test.key for test in self.own_tests], self.own_cap
        facts = (
            OUTPUT_FORMAT, self.body.ambient, self.dtypes, self.orders, count, self.grad, self.config.key(), tests,
            self.channels_last, self.start_grad, self.start_trained, self.solver_call, self.suspect, self.attached,
        )  # fmt: skip
        return f"{self.body.hash}-{hashlib.sha256(repr(facts).encode()).hexdigest()[:8]}"

    def layout(self, shapes: Sequence[Sequence[int]], rows: bool) -> Layout:
        return layout_of(tuple(tuple(s) for s in shapes), self.dtypes, self.orders, rows, self.channels_last)

    def arranged(self, operands: Sequence[Tensor]) -> Sequence[Tensor]:
        """Operands in the memory order that the body works in."""
        return channels_last(operands) if self.channels_last else operands


class Site:
    """The mutable side of a region: verdict, counters, and what was learnt from earlier calls.

    verdict   "pending" before the first call, then "solve" (a solve stands in for the loop), "follow" (the user's own iterates,
              to where they have converged) or "kept" (the loop as it was)
    follows   whether the body has several fixed points, so that a solve may end in another one than the loop
    rows      True: dimension 0 is a batch; False: one coupled system; None: not decided yet
    distance  last measured max over samples of |z_N - z*| / |z*|
    longest   evaluations of the longest solve that was compared; compared_at: the call that was compared last
    blank     comparisons in a row in which the loop's own result was not finite
    checked   iterations of the user's loop in the last comparison
    loose     how far apart loop and solve may be, and were where the loop's own test ended it
    tol       the solver's tolerance; a verification may have tightened the default
    backward_tol  the adjoint's tolerance; a measurement may have tightened the default
    gradient_error  relative error of the operands' gradients, as measured last; None before
    expected_vjps  what the last backward needed, for the next one to predict with
    reuses    whether the adjoint makes use of the forward's factors; backwards: forwards with one, so far
    steps     evaluations that solves needed lately: what the next one makes room for
    pending   captured solves whose outcome nobody has asked for yet, oldest first
    prepared  facts about the last call, and what serves for those: what runs the body; problem, adjoint_problem: what is asked
    engine    what the iterations ran on at the last call, and why on nothing better
    place     the loop as all ranks of a distributed run name it (agree.py)
    finding   what this site has said to the other ranks; None where it has said nothing
    votes     whether what it finds counts for the other ranks
    has_captures  whether captured solves are held for it; uncompiled: whether its body runs as it is, for now
    way_out   how the loop can be given back to stock Dynamo, where solving it cannot pay
    standing  what a report may ask for, for as long as somebody has it, the site gone or not
    pool, choice  what outlives a training step; the solver that is less work, under "auto"; warm: what the last call found
    counts    what is known by count, where that comes with each call
    """

    spec, verdict = OfCall(), OfCall()

    def __init__(self, key: str, spec: RegionSpec) -> None:
        self.key, self.spec = key, spec
        config = spec.config
        self.rows: bool | None = {"rows": True, "whole": False}.get(config.batch)
        self.follows = spec.suspect and spec.own_loop_cap is not None
        self.compares = spec.own_loop_cap is not None and config.verify != "never" and not spec.keeps
        self.verdict = "kept" if spec.keeps else "pending" if self.compares else self.solving
        self.distance: float | None = None
        self.longest = self.compared_at = self.blank = 0
        self.checked, self.loose = 0, self.allowed_distance
        self.tol = 0.0 if spec.stop else config.tol  # the user's test stops the batch, in place of a tolerance
        self.calls = self.misses = self.adjoint_misses = self.backwards = 0
        self.backward_tol, self.verify_gradient = config.backward_tol, False  # looked at by the next backward, as the value was
        self.gradient_error, self.expected_vjps = cast("tuple[float | None, int | None]", (None, None))
        self.reuses, self.steps, self.warned, self.warned_of_gradient = True, FIRST_STEPS, False, False
        self.pending: list[Solution] = []
        self.prepared = self.problem = self.adjoint_problem = cast("tuple[Any, Any]", (None, None))
        self.engine, self.engine_reason, self.kept_reason = "loop", "", ""  # a loop that is kept from the start has a note
        self.has_captures, self.uncompiled, self.place, self.votes = False, False, "", True
        self.finding: str | None = None
        self.pool = None if config.recycle == "never" else Pool(always=config.recycle == "always")
        self.choice, self.warm = choice_for(config), warm_for(config)
        self.counts = None if spec.outside is None else Counts(spec, None if self.compares else self.verdict)
        self.standing, self.way_out = Standing(), cast("WayOut | None", None)
        self.stand()

    def restart(self) -> None:
        """Be as before the first call."""
        fresh = vars(Site(self.key, self.spec))
        self.__dict__.update({name: value for name, value in fresh.items() if name not in _STAYS})
        self.stand()

    def stand(self) -> None:
        """Bring `standing` up to date."""
        now = self.standing
        now.status, now.distance, now.reuse = self.verdict, self.distance, self.reuses
        now.engine, now.engine_reason, now.gradient_error = self.engine, self.engine_reason, self.gradient_error
        now.recycle, now.chosen = ("" if found is None else str(found) for found in (self.pool, self.choice))
        now.kept_reason, now.counts = self.kept_reason, "" if self.counts is None else str(self.counts)

    @property
    def solving(self) -> str:
        """The verdict where something shorter than the loop stands in for it."""
        return "follow" if self.follows else "solve"

    @property
    def allowed_distance(self) -> float:
        """The largest relative difference from the loop's own result that counts as agreement."""
        return max(self.spec.config.verify_tol, 4 * self.spec.body_eps)

    def due(self) -> bool:
        """Whether this call, the `calls`-th from 0, compares the solve with the user's loop."""
        return self.compares and (self.verdict == "pending" or due(self, self._scheduled(self.calls)))

    def unusual(self, evaluations: int) -> bool:
        """Whether a solve was longer than any that was compared, which is how a body that stops converging shows between two
        comparisons. At most once in so many calls."""
        if not self.compares or self.spec.config.verify != "periodic" or evaluations <= self.longest:
            return False
        return self.verdict != "kept" and self.calls - self.compared_at >= schedule.UNUSUAL_EVERY

    def compared(self, evaluations: int) -> None:
        """Note a comparison, after a solve of so many evaluations."""
        self.longest, self.compared_at = max(self.longest, evaluations), self.calls

    def call_due(self) -> bool:
        """Whether this call of a solver, the `calls`-th from 0, is looked at for several fixed points."""
        return self.spec.solver_call and not (self.follows or of_steps(self.spec.config)) and self._scheduled(self.calls)

    def gradient_due(self) -> bool:
        """Whether this backward, the `backwards`-th from 0, is also made at a tenth of its tolerance."""
        return self.verify_gradient if self.compares else self._scheduled(self.backwards)

    def _scheduled(self, count: int) -> bool:
        return schedule.due(self.spec.config.verify, count, self.period)

    @functools.cached_property
    def period(self) -> int:
        """Calls between two comparisons of a long run."""
        return schedule.period_of(self.spec)

    def reuse_due(self) -> bool:
        """Whether this backward, the `backwards`-th from 0, is also tried without the forward's factors."""
        again = self.spec.config.verify == "periodic" and self.backwards % schedule.VERIFY_EVERY == 0
        return self.spec.config.reuse == "auto" and (self.backwards == 0 or again)

    def reuse(self, pays: bool) -> None:
        """Note whether the factors are worth their cost."""
        if pays != self.reuses:
            self.reuses = pays
            log.info("region %s at %s: the adjoint goes on %s factors", self.key, self.spec.where, "with" if pays else "without")
            self.stand()

    @property
    def capacity(self) -> int:
        """Updates that the next solve makes room for at first."""
        return (self.steps + 7) // 8 * 8

    def note_length(self, evaluations: int) -> None:
        """Note how long a solve was. What is not needed any more is given up little by little."""
        self.steps = max(evaluations, self.steps - 1)

    def note_engine(self, engine: str, reason: str) -> None:
        """Note the engine of a call."""
        if (engine, reason) != (self.engine, self.engine_reason):
            self.engine, self.engine_reason = engine, reason
            log.info("region %s at %s: engine %s %s", self.key, self.spec.where, engine, reason)
            self.stand()

    def decide(self, verdict: str, distance: float | None, why: str = why_kept.ELSEWHERE) -> None:
        """Go on by a verdict; `why` where that is "kept". A body once found to have several fixed points is not solved."""
        self.follows = self.follows or verdict == "follow"
        verdict = self.solving if verdict == "solve" else verdict
        if self.counts is not None:
            self.counts.decided(self.spec.iterations or 0, verdict)
        if verdict != self.verdict or distance is not None:
            level = logging.INFO if verdict != self.verdict else logging.DEBUG
            log.log(level, "region %s at %s: %s (distance %s)", self.key, self.spec.where, verdict, distance)
            self.verdict, self.kept_reason = verdict, why if verdict == "kept" else ""
            self.distance = distance if distance is not None else self.distance
            self.stand()


_STAYS = ("place", "votes", "way_out", "has_captures", "uncompiled", "standing")  # when a site begins again
_sites: weakref.WeakValueDictionary[str, Site] = weakref.WeakValueDictionary()
_owned: weakref.WeakKeyDictionary[Any, tuple[Site, ...]] = weakref.WeakKeyDictionary()  # by graph module or function
_awaited: OrderedDict[int, Site] = OrderedDict()
_lock = threading.Lock()
# Sites that are held for backwards to come whose ticket may be lost. Far more than one training step has.
MOST_AWAITED = 256


def register(spec: RegionSpec, place: str = "") -> Site:
    """A new site for a region; its key is the hash of what it is, and which of the living ones like it it is. It lives as long
    as somebody holds it. `place` names it among the ranks of a distributed run."""
    base = spec.fingerprint
    with _lock:
        key = next(key for n in itertools.count() if (key := f"{base}-{n}") not in _sites)
        site = Site(key, spec)
        site.place = place or base
        _sites[key] = site
        return site


def own(owner: Callable[..., Any], sites: Sequence[Site]) -> Callable[..., Any]:
    """Let sites live as long as a callable, and as what torch has wrapped it around. Returns the callable to go on with."""
    if not sites:
        return owner
    inner: Any = owner
    while inner is not None:
        try:  # a bound method is made anew at every look-up
            key = getattr(inner, "__self__", inner)
            _owned[key] = tuple(dict.fromkeys((*_owned.get(key, ()), *sites)))
        except TypeError:  # it takes no weak references
            return _holding(owner, tuple(sites))
        inner = callable_below(inner)
    return owner


def _holding(function: Callable[..., Any], sites: tuple[Site, ...]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return function(*args)

    call.sites = sites  # type: ignore[attr-defined]
    return call


def await_backward(site: Site) -> None:
    """Hold a site whose backward may have to find it by its key, since hooks on saved tensors may copy the ticket."""
    _awaited[id(site)] = site
    if len(_awaited) > MOST_AWAITED:
        _awaited.popitem(last=False)


def living() -> list[Site]:
    """All sites that somebody holds."""
    return list(_sites.values())


def clear() -> None:
    """Forget what sites have learnt, and hold none any more that only a copied ticket would look for."""
    _awaited.clear()
    backwards.clear()
    for known in living():
        known.restart()


def site(key: str) -> Site:
    found = _sites.get(key)
    if found is None:
        raise RuntimeError(
            f"deq::solve: expected a region registered in this process, got the unknown key {key!r}. A graph that was "
            "exported or cached elsewhere does not carry the bodies of its regions, and they end with the compiled function. "
            "Fix: compile the model in this process, with torch.compile(model, backend='deq') or @deq_compile, and keep it as "
            "long as it is called"
        )
    return found
