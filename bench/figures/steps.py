"""Views of ``python -m bench tables``, ``scaling`` and ``demo``: times of training steps as tables, and single figures."""

from __future__ import annotations

import functools
import statistics

from bench.demo import format_table
from bench.recycle import ways as recycle_ways
from bench.scaling import outputs as scaling_outputs
from bench.tables.methods import all_methods
from bench.tables.report import MISSING, UNCONVERGED, derive, number, step_ms

from .sources import Row, read
from .text import markdown, span

PEERS = {
    "eager": "eager loop",
    "inductor": "compiled loop",
    "torchdeq-broyden": "TorchDEQ Broyden",
    "torchdeq-fixed": "TorchDEQ fixed-point",
    "torchdeq-anderson": "TorchDEQ Anderson",
    "silva-broyden": "silva Broyden",
    "silva-fixed": "silva fixed-point",
    "jaxopt": "jaxopt, jitted",
    "optimistix": "optimistix, jitted",
    "deq": "**deq**",
    "deq-peer-tol": "deq, adjoint 1e-4",
    "bound": "bound",
}
BODIES = {  # of the problems of `bench.problems`
    "mlp128": "tanh layer, 128 units",
    "mlp128sym": "the same, slow to converge",
    "mlp1024": "tanh layer, 1024 units",
    "conv": "two convolutions, 32 x 16 x 16",
    "transformer": "attention and MLP, 64 x 256",
}
RATIOS = {"eager": "the eager loop", "inductor": "the compiled loop", "torchdeq": "TorchDEQ Broyden"}
RATIOS |= {"peer": "the best PyTorch peer that converged", "jax": "the best of JAX"}


@functools.cache
def _groups(name: str) -> dict[str, dict[str, Row]]:
    """Problem -> method -> row, with what `derive` adds; the form in which the injection is computed before the loop."""
    found = read(name)
    kinds = {key: method.kind for key, method in all_methods().items()}
    groups: dict[str, dict[str, Row]] = {}
    for row in derive(found["rows"], kinds, found["clock"]):
        if row["inject"] in ("before", "own"):
            groups.setdefault(row["problem"], {})[row["method"]] = row
    return groups


def ratio(name: str, problem: str, against: str, method: str = "deq") -> float:
    """How many times as fast as `against` (a key of `RATIOS`, or "bound") a row of ours is.

    Raises:
        KeyError: no such row, or no such ratio: the other did not converge, or was not measured.
    """
    return float(_groups(name)[problem][method]["ratio"][against])


def least(name: str, against: str, method: str = "deq") -> float:
    """The smallest of the ratios over the problems."""
    return min(_every(name, against, method))


def most(name: str, against: str, method: str = "deq") -> float:
    """The largest of them."""
    return max(_every(name, against, method))


def _every(name: str, against: str, method: str) -> list[float]:
    rows = [group[method] for group in _groups(name).values()]
    return [float(row["ratio"][against]) for row in rows if against in row["ratio"]]


def _cell(row: Row | None, clock: str) -> str:
    mark = f" {UNCONVERGED}" if row and row.get("converged") is False else ""
    return number(step_ms(row, clock), ".1f") + mark


def _factors(row: Row) -> str:
    return MISSING if row.get("reused") is None else "yes" if row["reused"] else "no"


def headline(name: str) -> str:
    """One line a problem: what a step took in each of four ways, what ours is worth, and how good its gradient is."""
    clock = read(name)["clock"]
    shown = ("eager", "inductor", "torchdeq-broyden", "deq")
    lines = []
    for problem, rows in _groups(name).items():
        ours = rows["deq"]
        ratios = [number(ours["ratio"].get(key), ".1f", "×") for key in ("inductor", "torchdeq", "peer")]
        head = f"{BODIES[problem]}, N = {ours['n_iter']}"
        error = f"{ours['gradient_error']:.0e}"
        lines.append([head, *(_cell(rows.get(key), clock) for key in shown), *ratios, error, _factors(ours)])
    ratios = ["… the compiled loop", "… TorchDEQ Broyden", "… the best PyTorch peer"]
    return markdown(["ms a step", *(PEERS[key] for key in shown), *ratios, "gradient error", "factors in the backward"], lines)


def reused(name: str) -> int:
    """In how many rows of the headline the forward's factors served the backward."""
    return sum(bool(rows["deq"].get("reused")) for rows in _groups(name).values())


def wide(name: str) -> str:
    """One column a problem: every way, and how many times as fast as each ours is."""
    clock, groups = read(name)["clock"], _groups(name)
    present = [key for key in PEERS if any(step_ms(rows.get(key), clock) is not None for rows in groups.values())]
    lines = [[PEERS[key], *(_cell(rows.get(key), clock) for rows in groups.values())] for key in present]
    for key, label in RATIOS.items():
        cells = [number(rows["deq"]["ratio"].get(key), ".2f", "×") for rows in groups.values()]
        if set(cells) != {MISSING}:
            lines.append([f"deq against {label}", *cells])
        if key == "torchdeq":
            cells = [number(rows["deq-peer-tol"]["ratio"].get(key), ".2f", "×") for rows in groups.values()]
            lines.append(["… the same at equal gradient error", *cells])
    lines.append(["deq over the bound", *(number(rows["deq"]["ratio"].get("bound"), ".2f") for rows in groups.values())])
    lines.append(["factors in the backward", *(_factors(rows["deq"]) for rows in groups.values())])
    for key, label in (("deq", "gradient error"), ("deq-peer-tol", "… with adjoint 1e-4")):
        lines.append([label, *(f"{rows[key]['gradient_error']:.0e}" for rows in groups.values())])
    heads = [f"{problem}, N = {rows['deq']['n_iter']}" if rows["deq"]["n_iter"] else problem for problem, rows in groups.items()]
    return markdown(["ms a step", *heads], lines)


def models(name: str) -> str:
    """One line a model of ``bench/models``: the eager loop, ours, and the ratio."""
    clock = read(name)["clock"]
    lines = []
    for problem, rows in _groups(name).items():
        lines.append([problem, _cell(rows["eager"], clock), _cell(rows["deq"], clock), f"{rows['deq']['ratio']['eager']:.1f}×"])
    return markdown(["ms a step", "eager loop", "deq", "times as fast"], lines)


def _point(name: str, sweep: str, point: str) -> dict[str, Row]:
    return scaling_outputs.by_point(read(name)["rows"], "memory" if sweep == "memory" else "timing")[point]


def scaling(name: str, sweeps: tuple[str, ...] = ("D", "B", "N")) -> str:
    """One column a point of the sweeps: how many times as fast as the others ours is."""
    found = read(name)
    points = [(sweep, point) for sweep in sweeps for point in found["sweeps"][sweep]]
    points = list({point: (sweep, point) for sweep, point in points}.values())
    others = ("eager", "torchdeq-broyden", "torchdeq-fixed")
    lines = []
    for sweep, point in points:
        rows = _point(name, sweep, point)
        own, *cells = (step_ms(rows.get(method), found["clock"]) for method in ("deq", *others))
        ratios = (number(cell / own if cell and own else None, ".1f", "×") for cell in cells)
        lines.append([point.replace("mlp-", "").replace("-", ", "), *ratios])
    return markdown(["deq is, times as fast as", *(PEERS[method] for method in others)], lines)


def memory(name: str) -> str:
    """One column a point: the peak of a step in MB."""
    found = read(name)
    points = found["sweeps"]["memory"]
    methods = ("eager", "torchdeq-broyden", "torchdeq-fixed", "deq")
    lines = []
    for method in methods:
        cells = [number(_point(name, "memory", point).get(method, {}).get("memory_mb"), ".0f") for point in points]
        lines.append([PEERS[method], *cells])
    return markdown(["peak MB of a step", *(f"N = {point.rsplit('N', 1)[1]}" for point in points)], lines)


def _demo(name: str) -> dict[str, Row]:
    rows: dict[str, Row] = read(name)["rows"]
    return rows


def _steady(row: Row) -> float:
    return statistics.median(row["seconds"][1:])


def demo(name: str) -> str:
    """The table that ``make demo`` prints."""
    return format_table(_demo(name))


def speedup(name: str, against: str) -> float:
    """How many times as fast a step of the demo is through deq as through another row ("eager", "inductor")."""
    rows = _demo(name)
    return _steady(rows[against]) / _steady(rows["deq"])


def accuracy(name: str) -> str:
    """Test accuracy of the demo's rows, in percent: one figure where they agree."""
    return span([100 * row["accuracy"] for row in _demo(name).values()], ".1f") + " %"


def sizes(name: str) -> str:
    """Compilations and steady steps over many sizes."""
    lines = [
        [
            {"batches": "batch sizes", "lengths": "lengths, with attention", "counts": "counts of iterations"}[row["problem"]],
            row["sizes"], row["graphs"], row["body_compilations"], f"{row['ratio']:.2f}",
            f"{row['peak_mib'] - row['peak_mib_half_way']:.0f}",
        ]
        for row in read(name)["rows"]
    ]  # fmt: skip
    headers = [
        "",
        "how many",
        "graphs",
        "compilations of the body",
        "step, of one compiled for that size",
        "MiB that the second half added",
    ]
    return markdown(headers, lines)


def recycled(name: str) -> str:
    """Evaluations and products without recycled factors and with them, means over the seeds of each body and tolerance."""
    rows, lines = read(name)["training"], []
    for tol, body in dict.fromkeys((row["tol"], row["body"]) for row in rows):
        mine = [row for row in rows if (row["tol"], row["body"]) == (tol, body)]
        cells = [f"{tol:g}", body]
        for what in ("evaluations", "products"):
            without, with_it = (sum(row[key] for row in mine) / len(mine) for key in (f"{what} without", what))
            on = sum(row[f"{what} share on"] for row in mine) / len(mine)
            cells += [f"{without:.1f} → {with_it:.1f}", f"{100 * (with_it / without - 1):+.1f} %", f"{100 * on:.0f} %"]
        lines.append(cells)
    headers = ["tol", "body", "evaluations", "", "of the steps", "products", "", "of the steps"]
    return markdown(headers, lines)


def study(name: str) -> str:
    """What changes of the constants of recycling make of evaluations and products: means over the bodies of the changes against
    those without."""
    rows, lines = read(name)["study"], []
    for changed in dict.fromkeys(row["changed_to"] for row in rows):
        mine, cells = [row for row in rows if row["changed_to"] == changed], [changed or "as built"]
        for what in ("evaluations", "products"):
            shares = [100 * (row[what] / row[f"{what} without"] - 1) for row in mine]
            cells.append(f"{statistics.mean(shares):+.1f} % ({min(shares):+.0f} to {max(shares):+.0f})")
        lines.append(cells)
    return markdown(["", "evaluations (bodies)", "products (bodies)"], lines)


def ways(name: str) -> str:
    """Products of adjoints by what preconditions them, means over seeds; in brackets with what the way itself costs, in those."""
    table = recycle_ways.table(read(name)["ways"])
    return markdown(list(table[0]), [list(line.values()) for line in table])


def chosen(name: str) -> str:
    """Whole training steps by Broyden and by the solver that chooses itself."""
    lines = [
        [
            row["problem"], f"{row['ms broyden']:.1f}", f"{row['ms auto']:.1f}",
            f"{row['speed-up']:.2f} ({row['quartiles'][0]:.2f} to {row['quartiles'][2]:.2f})", row["uses"].split(",")[0],
        ]
        for row in read(name)["solver"]
    ]  # fmt: skip
    return markdown(["", "ms by Broyden", "ms", "speed-up (quartiles)", "chosen"], lines)


def first_steps(name: str) -> str:
    """Seconds until the first step of a process is done, with an empty cache and with a filled one (CPU seconds in brackets), and
    what part of Inductor's that is; medians."""
    rows, kinds = read(name)["rows"], [(cache, what) for cache in ("cold", "warm") for what in ("total_s", "cpu_s")]
    found = {
        who: [statistics.median(r[what] for r in rows if (r["row"], r["cache"]) == (who, cache)) for cache, what in kinds]
        for who in ("inductor", "deq")
    }
    lines = [[PEERS[who], *(f"{a:.1f} ({b:.1f})" for a, b in (times[:2], times[2:]))] for who, times in found.items()]
    shares = [f"{mine / other:.2f}" for mine, other in zip(found["deq"], found["inductor"], strict=True)]
    share = [f"{a} ({b})" for a, b in (shares[:2], shares[2:])]
    return markdown(["seconds (of CPU)", "cold", "warm"], [*lines, ["share", *share]])
