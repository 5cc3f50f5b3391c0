"""Small real models in the style of public code, each with a plain loop: `make() -> (model, inputs)`.

They contract, so that a loop of 40 or 50 is at its fixed point to 1e-6 (spiking nets excepted, which have none).
"""

from __future__ import annotations

from bench.models import deq_transformer, flow, graph, mdeq, spiking

MODELS = {
    "mdeq": mdeq.make,
    "deq_transformer": deq_transformer.make,
    "flow": flow.make,
    "graph": graph.make,
    "spiking": spiking.make,
}
