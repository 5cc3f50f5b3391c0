"""The `torch.compile` backend: options, passes, regions, and the inner backend for everything else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

from torch import fx

from .as_written import Written, turning
from .caches import reset
from .capture import dynamo, install, sites
from .compiling import seldom
from .config import Options
from .explicit import prepare
from .exporting import install as install_exports
from .inner import CompiledFn, compile_rest, usable
from .kernels import ahead
from .region.site import own
from .report import Report
from .rewrite import rewrite_if_possible
from .torch_parts import known_backends, register_backend
from .undecided import compiled_when_decided, undecided

_NOT_IN_PACKAGES = "a fixed-point region has its body in the process that compiled it; the next one compiles it again"


class Backend:
    """The "deq" backend with its options bound; what `@deq_compile` and `explain` hand to `torch.compile`.

    report: collects what is found in every graph; None for a report of each graph's own (logged, then dropped).
    votes: whether what its regions find counts for the other ranks of a distributed run.
    """

    __name__ = "deq"
    takes_whole_graphs = True  # DDP must not split a graph before it arrives (capture/ddp.py)

    def __init__(
        self, options: Mapping[str, Any] | Options | None = None, report: Report | None = None, *, votes: bool = True
    ) -> None:
        self.options = Options.from_options(options)
        self.report, self.votes = report, votes

    def __call__(
        self,
        gm: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> CompiledFn:
        outer = self.options.merge(Options.from_options(options))
        report = self.report if self.report is not None else Report()
        written = Written(gm)
        try:
            made = rewrite_if_possible(gm, outer, report)
        finally:
            self.tell(report)
        for site in made:
            site.votes = self.votes
        if made:
            dynamo.leave_out_of_packages(_NOT_IN_PACKAGES)
        config = outer.resolve()

        def compile_graph(graph: fx.GraphModule, inputs: Sequence[Any]) -> CompiledFn:
            return compile_rest(graph, inputs, config, mode)

        if usable(config, example_inputs).inner == "inductor" and undecided(gm, made, written):
            compiled = compiled_when_decided(gm, example_inputs, made, written, compile_graph)
        else:
            compiled = compile_graph(gm, example_inputs)
        return own(turning(compiled, made, written, compile_graph), made)

    def reset(self) -> None:
        """What `torch._dynamo.reset()` calls of every backend that it has seen."""
        reset()

    def tell(self, report: Report) -> None:
        """Add what capture refused while it traced for this backend."""
        report.skipped += [skipped for skipped in sites.refusals(self) if skipped not in report.skipped]


_default = Backend()


def deq(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> CompiledFn:
    """`torch.compile(model, backend="deq", options={...})`; the options are those of `deq_compile.config.Options`.

    `mode` is translated for Inductor. An unknown option or a bad value is a ValueError (inside torch's
    BackendCompilerFailed) that names it, the known ones and the nearest match.
    """
    return _default(gm, example_inputs, mode=mode, options=options)


deq.takes_whole_graphs = True  # type: ignore[attr-defined]
deq.reset = reset  # type: ignore[attr-defined]


def _register_backend() -> None:
    """Make `backend="deq"` known from a plain checkout; an installed package is found through its entry point."""
    if "deq" not in entry_points(group="torch_dynamo_backends").names and "deq" not in known_backends:
        register_backend(deq, name="deq")


_register_backend()
with seldom():  # much is imported
    ahead.begin()
    install()  # capture: whoever looks this backend up is about to trace for it
    install_exports()
    prepare()
