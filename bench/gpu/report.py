"""The short table at the end: what is wrong first, then the figures that decide."""

from __future__ import annotations

from tabulate import tabulate

from .common import Row


def table(rows: list[Row], failed: list[str]) -> str:
    """All of it as text, short enough for the tail of a log."""
    parts = [_facts(rows), _checks(rows, failed), _experiments(rows), _kernels(rows), _steps(rows)]
    return "\n\n".join(part for part in parts if part)


def _facts(rows: list[Row]) -> str:
    device = next((r for r in rows if r["what"] == "device"), {})
    copies = [r for r in rows if r["what"] == "copy bandwidth" and "GB_per_s" in r]
    names = ("device", "torch", "triton", "python", "date")
    rates = "".join(f"; copy of {r['GiB']} GiB {r['GB_per_s']} GB/s" for r in copies)
    return ", ".join(str(device.get(n, "?")) for n in names) + rates


def _checks(rows: list[Row], failed: list[str]) -> str:
    checked = [r for r in rows if "ok" in r]
    wrong = [r for r in rows if r.get("ok") is False or "error" in r]
    lines = [f"{sum(bool(r['ok']) for r in checked)} of {len(checked)} checks passed"]
    lines += [f"PART FAILED {f}" for f in failed]
    for row in wrong:
        told = {k: v for k, v in row.items() if k not in ("part", "what", "ok", "trace")}
        lines.append(f"WRONG {row['part']} / {row['what']}: {str(told)[:220]}")
    return "\n".join(lines)


def _experiments(rows: list[Row]) -> str:
    chosen = [r for r in rows if r["part"] == "experiments" and ("us_per_trip" in r or "us_device" in r)]
    shown = []
    for r in chosen:
        what = f"{r.get('kernels', '')} kernels" if "us_per_trip" in r else f"B{r['B']} D{r['D']} {r['engine']}"
        shown.append([
            r["what"].split(":")[0], what, r.get("us_per_trip"), r.get("iterations"), r.get("us_per_iteration_beyond_body"),
            r.get("us_host"), r.get("us_wall"), r.get("build_ms"),
        ])  # fmt: skip
    heads = ["experiment", "what", "µs a trip", "iterations", "µs/iter beyond body", "host µs", "wall µs", "build ms"]
    return tabulate(shown, heads) if shown else ""


def _kernels(rows: list[Row]) -> str:
    chosen = [r for r in rows if r["part"] == "kernels" and "us" in r]
    shown = [
        [r["what"], r["shape"], r["n"], r["factors"], r["form"], r["us"], r.get("predicted_us"), f"{r['share_of_copy']:.0%}"]
        for r in chosen
    ]
    return tabulate(shown, ["kernel", "shape", "n", "factors", "form", "µs", "predicted", "of copy"]) if shown else ""


def _steps(rows: list[Row]) -> str:
    chosen = [r for r in rows if r["what"] == "step" and "ms" in r]
    shown = [
        [r["problem"], r["way"], r["ms"], r["against_eager"], r.get("iterations"), r.get("vjps"), f"{r['gradient_error']:.1e}"]
        for r in chosen
    ]
    return tabulate(shown, ["problem", "way", "ms", "against eager", "iterations", "VJPs", "gradient error"]) if shown else ""
