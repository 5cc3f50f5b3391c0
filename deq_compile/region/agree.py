"""Ranks of a distributed run come to one decision about a loop, and no rank ever waits for another.

A collective here could meet one of the training loop's and corrupt it, and a rank that waits may wait for a rank that never
comes: it compiled one graph more (a smaller last batch), called once more (an evaluation), or has ended. So the ranks share a
number in the key-value store of their process group, and nothing else. The protocol:

- **What is decided about** is a place: the loop at a line of the user's code, with its operations, options and dtypes. Its name
  is made of content, the same on all ranks, however often each of them compiled or called it; sizes are no part of it, since one
  rank may compile for any batch size what another compiled for one.
- **A finding** is what a site learnt from its own data: ``solve``, ``follow`` or ``kept``, from the boldest to the most
  conservative. A rank's finding about a place is the most conservative one of its live sites there.
- **Saying**: where its finding changes, a rank adds the difference to the place's number, which counts the ranks that find
  ``kept`` and those that find ``follow``. One atomic addition that returns the sum: it neither waits nor grows with the number of
  ranks.
- **Acting**: the decision is the most conservative finding of all ranks. A rank acts on its own finding at once; it looks at the
  others' whenever it says something, in each of the first calls, and at every `LOOK_EVERY`-th call after them. Ranks that step
  together look at the same calls, so that all others turn at the same call, and the next look is never far away.
- **Changing back**: a rank that finds ``solve`` again takes ``kept`` back; when the last one has, all solve. A site that has once
  been told to ``follow`` does not forget it (`Site.decide`): the body has several fixed points on every rank.
- A rank that has said nothing objects to nothing. A rank that was alone with a place decided alone and lost no time.

Only calls that record gradients take part: evaluation often runs on one rank. So does no loop whose count comes with each call:
the ranks draw other counts. `explain` listens and says nothing.
"""

from __future__ import annotations

import logging
import threading
import weakref
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

if TYPE_CHECKING:
    from .site import Site

log = logging.getLogger("deq_compile.region")

FINDINGS = ("solve", "follow", "kept")  # a later one beats an earlier one
# Calls between two looks, after as many calls that all look. A look took 8 us on one machine, a round trip between two.
LOOK_EVERY = 16
# The number of a place: ranks that follow in the lower bits, ranks that keep in the upper ones.
_WEIGHT = {"solve": 0, "follow": 1, "kept": 1 << 24}


class _Place:
    """What this process has to do with a place: its sites there, and what it added to the number."""

    def __init__(self) -> None:
        self.sites: weakref.WeakSet[Site] = weakref.WeakSet()
        self.said = 0

    @property
    def weight(self) -> int:
        return _WEIGHT[strictest(*(site.finding for site in self.sites if site.finding))]


_places: dict[str, _Place] = {}
_heard_by: Any = None  # a weak reference to the store that `said` was said to
_silent = False  # the store failed once
_lock = threading.Lock()


def strictest(*findings: str) -> str:
    """The most conservative of some findings; "solve" of none."""
    return max(findings, key=FINDINGS.index, default="solve")


def agreed(site: Site, what: str, mine: str) -> str:
    """Say what a site found, and decide: the most conservative finding of all ranks, as far as they have said it.

    Never waits. Without a process group of at least two ranks, and where no gradients are recorded, `mine` is the decision.

    Args:
        site: whose region it is.
        what: on what grounds ("value", "gradient", "misses"), for the log.
        mine: "solve", "follow" or "kept".
    """
    if not site.spec.grad or site.counts is not None or (store := _store()) is None:
        return mine
    site.finding = mine
    others = _exchange(site, store)
    if others is None or (decision := strictest(mine, others)) == mine:
        return mine
    log.info("region %s at %s: %s by its own %s, %s for all ranks", site.key, site.spec.where, mine, what, decision)
    return decision


def look(site: Site) -> None:
    """Do as the other ranks found, at the calls where all ranks look; for the start of every call. Costs nothing alone."""
    if site.finding is None or (site.calls >= LOOK_EVERY and site.calls % LOOK_EVERY) or (store := _store()) is None:
        return
    others = _exchange(site, store)
    if others is not None and (decision := strictest(site.finding, others)) != site.verdict:
        log.info("region %s at %s: all ranks turn to %s", site.key, site.spec.where, decision)
        site.decide(decision, None)


def _exchange(site: Site, store: Any) -> str | None:
    """Say what is new about the place of a site, and hear the strictest finding of any rank; None where nobody answers."""
    global _heard_by, _silent
    with _lock:
        if _heard_by is None or _heard_by() is not store:  # another process group: it has heard nothing yet
            _heard_by = weakref.ref(store)
            for old in _places.values():
                old.said = 0
        place = _places.get(site.place)
        if place is None:
            for name in [name for name, old in _places.items() if not old.sites and not old.said]:
                del _places[name]
            place = _places[site.place] = _Place()
        if site.votes:
            place.sites.add(site)
        weight = place.weight
        try:
            number = store.add(f"deq_compile/{site.place}", weight - place.said)
        except Exception as error:  # whatever a store may raise whose server is gone: the decision is this rank's own then
            _silent = True
            log.warning(
                "deq_compile: the key-value store of the process group does not answer (%s: %s). From now on this rank decides "
                "about its regions alone",
                type(error).__name__, (str(error).splitlines() or [""])[0][:200],
            )  # fmt: skip
            return None
        place.said = weight
    return "kept" if number >= _WEIGHT["kept"] else "follow" if number > 0 else "solve"


def _store() -> Any:
    """The key-value store of a process group of at least two ranks, or None."""
    if _silent or not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        return None
    from deq_compile.torch_parts import default_store

    return default_store()


def clear() -> None:
    """Forget a store that failed. What was said stays known: the other ranks remember it too, and it has to be taken back."""
    global _silent
    _silent = False
