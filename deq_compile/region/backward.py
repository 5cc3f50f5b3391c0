"""What a backward mode is: how the adjoint w of a cotangent is found. One file a mode, in `backwards`; `BACKWARDS` knows them."""

from __future__ import annotations

import abc
import itertools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from deq_compile.kernels.broyden import Factors
from deq_compile.region.pool import Recycled, Way
from deq_compile.registry import BACKWARDS

__all__ = ["BACKWARDS", "AdjointCall", "Backward", "Settled", "of_steps"]

if TYPE_CHECKING:
    from deq_compile.config import Config
    from deq_compile.region.adjoint import AdjointSolution
    from deq_compile.region.body import Linearised
    from deq_compile.region.site import Site
    from deq_compile.region.warm import Start


def of_steps(config: Config) -> bool:
    """Whether the gradient is that of the solver's own steps, so that nothing else may stand in for its result."""
    return BACKWARDS[config.backward].gradient == "iteration"


@dataclass
class Settled:
    """What the first backward through a forward has settled for all others through it, whatever the region learns in between:
    equal cotangents have equal gradients.

    done      whether there has been one
    tol       its tolerance; expected: the products that it expected
    way       how it was preconditioned, by name ("plain", "factors", "shared")
    captured  whether a captured graph gave it
    loops     the fixed point's gradient was seen not to be that of the user's loop
    """

    done: bool = False
    tol: float = 0.0
    expected: int | None = None
    way: str | None = None
    captured: bool = False
    loops: bool = False

    def settle(self, tol: float, expected: int | None, way: str, *, captured: bool = False) -> None:
        """Note what the first backward came to; later ones change nothing."""
        if not self.done:
            self.done, self.tol, self.expected, self.way, self.captured = True, tol, expected, way, captured

    def tolerance(self, site: Site) -> float:
        """Of the adjoint."""
        return self.tol if self.done else site.backward_tol


_kept: OrderedDict[int, Settled] = OrderedDict()
_numbers = itertools.count(1)
MOST_KEPT = 256  # far more than forwards whose backwards are to come, where hooks on saved tensors are at work


def keep(settled: Settled) -> int:
    """Keep what a forward hands on for a backward to which it may not arrive, for which it is this number."""
    number = next(_numbers)
    _kept[number] = settled
    if len(_kept) > MOST_KEPT:
        _kept.popitem(last=False)
    return number


def kept(number: int) -> Settled:
    """What was kept; new where that is nothing."""
    return _kept.get(number) or Settled()


def clear() -> None:
    """Forget what was kept."""
    _kept.clear()


@dataclass
class AdjointCall:
    """One backward of one region, as a mode sees it.

    site      of the region: options in ``site.spec.config``, and what earlier calls have taught
    factors   of the forward, where the mode wants them and they have arrived
    inside    whether somebody captures the stream: nothing may be asked of the device
    again     makes the factors of a forward whose own did not arrive, by solving once more
    recycled  what earlier batches have left, as the forward found it; None where nothing is recycled
    warm      the last adjoint, as the forward found it; None where nothing begins from it
    settled   by the first backward through the same forward
    captured  the same adjoint, preconditioned in that way, as a captured graph would give it; None where none serves
    """

    site: Site
    factors: Factors | None = None
    inside: bool = False
    again: Callable[[], Factors | None] = lambda: None
    captured: Callable[[Way], AdjointSolution | None] = lambda way: None
    recycled: Recycled | None = None
    warm: Start | None = None
    settled: Settled = field(default_factory=Settled)

    @property
    def tol(self) -> float:
        """The tolerance of the adjoint."""
        return self.settled.tolerance(self.site)

    @property
    def expected(self) -> int | None:
        """The products that it is expected to take, where that is known."""
        return self.settled.expected if self.settled.done else self.site.expected_vjps

    @property
    def reuses(self) -> bool:
        """Whether it makes use of the forward's factors, where that is not being tried out."""
        return self.settled.way == "factors" if self.settled.done else self.site.reuses


class Backward(abc.ABC):
    """A way from the cotangent q of a fixed point to an adjoint w, whose VJP gives the gradients.

    name           what the option ``backward`` calls it
    wants_factors  whether it uses the factors that a forward solve leaves
    gradient       "implicit": that of the fixed point, which is compared with the loop's own; "loop": that of the loop's own
                   iterates; "iteration": that of the solver's own steps; "approximate": another one, which the user has asked for
    """

    name: str
    wants_factors: ClassVar[bool] = False
    gradient: ClassVar[Literal["implicit", "loop", "iteration", "approximate"]] = "approximate"

    @abc.abstractmethod
    def solve(self, linear: Linearised, q: Tensor, call: AdjointCall) -> AdjointSolution:
        """The adjoint for cotangents q (B, D), with its certificate; `certified_at` makes one of any w.

        Args:
            linear: the body linearised at the fixed point.
            q: (B, D), compute dtype; left as it is.
            call: the region and what its forward has left.
        """
