"""Move out of the loop what does not depend on the state: input injections, weight normalisation, masks.

The copy in the first segment stays in the graph and is computed once; the body reads its value as an operand.
"""

from __future__ import annotations

import torch
from torch import fx

from .ambient import AUTOCAST_TARGETS
from .base import Loop, Pass, PassContext, value_of


class Hoist(Pass):
    name = "hoist"

    def run(self, graph: fx.Graph, context: PassContext) -> int:
        # the body of a region that was marked was traced once: what it reads and does not change stands outside of it
        return sum(self._hoist(loop) for loop in context.loops if loop.count > 1)

    def _hoist(self, loop: Loop) -> int:
        segment, first = loop.segment(-1), loop.segment(0)
        inside = {node: offset for offset, node in enumerate(segment)}
        chain = set(loop.nodes)
        depends: set[int] = set()
        for offset, node in enumerate(segment):
            carried = any(a in chain and a not in inside for a in node.all_input_nodes)
            if carried or any(inside.get(a, -1) in depends for a in node.all_input_nodes):
                depends.add(offset)
        fixed = [o for o, node in enumerate(segment) if o not in depends and node.target not in AUTOCAST_TARGETS]
        hoisted = set(fixed) - set(loop.carried) - loop.test_offsets
        # What the remaining body reads has to be a tensor or a size; a tuple has to stay with its reader.
        for offset in reversed(fixed):
            node = segment[offset]
            read_inside = any(u in inside and inside[u] not in hoisted for u in node.users)
            if read_inside and not isinstance(value_of(node), torch.Tensor | torch.SymInt):
                hoisted.discard(offset)
        for offset in sorted(hoisted):
            if any(inside[a] not in hoisted for a in segment[offset].all_input_nodes if a in inside):
                hoisted.discard(offset)
        loop.hoisted_offsets = tuple(sorted(hoisted))
        loop.kept_nodes = tuple(first[o] for o in loop.hoisted_offsets)
        return len(loop.hoisted_offsets)
