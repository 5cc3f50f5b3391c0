"""The short table at the end: what is wrong first, then the figures that decide."""

from __future__ import annotations

from tabulate import tabulate

from .store import Results, Row

NAMES = ("device", "torch", "triton", "python", "nvidia_smi", "date")


def heading(results: Results) -> str:
    """The device, the versions, the day and the copy bandwidth; or that there are none."""
    if not results.facts:
        return "no device has been measured"
    copies = [r for r in results.rows if r["what"] == "copy bandwidth" and "GB_per_s" in r]
    rates = "".join(f"; copy of {r['GiB']} GiB {r['GB_per_s']} GB/s" for r in copies)
    titled = {"torch": "torch ", "triton": "triton ", "python": "Python "}
    told = [f"{titled.get(n, '')}{results.facts[n]}" for n in NAMES if n in results.facts]
    return ", ".join(told) + rates


def table(results: Results) -> str:
    """All of it as text, short enough for the tail of a log."""
    from .goals import table as goals

    parts = [heading(results), _checks(results), _probes(results), _solves(results), _kernels(results), _steps(results)]
    return "\n\n".join([*(part for part in parts if part), goals(results).partition("\n\n")[2]])


def _checks(results: Results) -> str:
    checked = [r for r in results.rows if "ok" in r]
    lines = [f"{sum(bool(r['ok']) for r in checked)} of {len(checked)} checks passed"]
    lines += [f"GROUP FAILED {f}" for f in results.failed]
    for row in results.wrong:
        told = {k: v for k, v in row.items() if k not in ("run", "part", "group", "what", "ok", "trace")}
        lines.append(f"WRONG {row['part']} / {row['what']}: {str(told)[:220]}")
    lines += [f"stopped in {r['part']} {r['group']} at {r['at']}" for r in results.rows if r["what"] == "stopped: out of time"]
    lines += [
        f"compiling ahead failed: {r['task']}: {r['failed'][:150]}"
        for r in results.rows
        if r["part"] == "compile" and "failed" in r
    ]
    if results.others:
        lines.append(f"rows of other devices or versions left out: {', '.join(results.others)}")
    return "\n".join(lines)


def _probes(results: Results) -> str:
    shown = []
    for r in results.rows:
        if r["part"] == "probe" and r["what"].startswith("probe "):
            numbers = {k: v for k, v in r.items() if k not in ("run", "part", "group", "what", "ok", "predicted", "trace")}
            answer = "skipped" if "skipped" in r and "ok" not in r else "ok" if r.get("ok") else "FAIL"
            shown.append([r["what"].removeprefix("probe "), answer, str(numbers)[:110]])
    return tabulate(shown, ["probe", "", "numbers"], disable_numparse=True) if shown else ""


def _solves(results: Results) -> str:
    shown: list[list[object]] = []
    for r in results.rows:
        if r["part"] != "experiments" or not ("us_per_trip" in r or "us_device" in r):
            continue
        what = f"{r['kernels']} kernels" if "us_per_trip" in r else f"B{r['B']} D{r['D']} {r['engine']}"
        shown.append([
            r["what"].split(":")[0], what, r.get("us_per_trip"), r.get("iterations"), r.get("us_per_iteration_beyond_body"),
            r.get("times_the_floor"), r.get("launches"), r.get("us_host"), r.get("us_wall"), r.get("build_ms"), r.get("reason"),
        ])  # fmt: skip
    heads = ["experiment", "what", "µs a trip", "iterations", "µs/iter beyond body", "× floor", "launches", "host µs", "wall µs"]
    return tabulate(shown, [*heads, "build ms", "why not better"]) if shown else ""


def _kernels(results: Results) -> str:
    chosen = [r for r in results.rows if r["part"] == "kernels" and "us" in r]
    shown = [
        [
            r["what"], r["shape"], r["n"], r["factors"], r["form"], r["us"], r["us_host"], r["times_the_floor"],
            f"{r['share_of_copy']:.0%}", "" if r["host_hidden"] else "host seen",
        ]
        for r in chosen
    ]  # fmt: skip
    return (
        tabulate(shown, ["kernel", "shape", "n", "factors", "form", "µs", "host µs", "× floor", "of copy", ""]) if shown else ""
    )


def _steps(results: Results) -> str:
    shown = [_step(r) for r in results.rows if r["what"] == "step" and ("ms" in r or "skipped" in r or "failed" in r)]
    heads = [
        "problem",
        "way",
        "ms",
        "host ms",
        "device ms",
        "× eager",
        "× Inductor",
        "× TorchDEQ",
        "its",
        "VJPs",
        "errors: value",
    ]
    return tabulate(shown, [*heads, "gradient", ""]) if shown else ""


def _step(r: Row) -> list[object]:
    if "ms" not in r:
        return [r["problem"], r["way"], *[None] * 10, str(r.get("skipped") or r.get("failed"))[:80]]
    ran = "/".join(r.get("forward", []))
    told = " ".join(str(t) for t in (r.get("status"), ran, *r.get("reasons", [])) if t)
    return [
        r["problem"], r["way"], r["ms"], r.get("ms_host"), r.get("ms_device"), r.get("against_eager"), r.get("against_inductor"),
        r.get("against_torchdeq"), r.get("iterations"), r.get("vjps"), f"{r['value_error']:.1e}", f"{r['gradient_error']:.1e}",
        told[:80],
    ]  # fmt: skip
