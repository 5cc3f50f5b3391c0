"""docs/reach.md, from the rows: what was found, how far off, what a step costs, and the reason otherwise."""

from __future__ import annotations

from typing import Any

from tabulate import tabulate

from bench import machine

from .ways import Row

WRONG_VALUE, WRONG_GRADIENT, TIMES_ITS_OWN = 1e-2, 5e-2, 3.0
SLOWER, DEARER = 1.03, 1.25
HEADERS = ["model", "iterates", "regions", "graphs", "breaks", "value error", "gradient error"]
HEADERS += ["step (ms)", "of Inductor's", "first step", "first eleven"]


def found(row: Row) -> str:
    """Regions by status, as they stood after the last step."""
    statuses = [region["status"] for region in row["deq"].get("regions", [])]
    return ", ".join(f"{statuses.count(s)} {s}" for s in dict.fromkeys(statuses)) or "none"


def replaced(row: Row) -> bool:
    return any(region["status"] in ("solve", "follow") for region in row["deq"].get("regions", []))


def crashed(row: Row) -> bool:
    """deq fails where the eager model and Inductor run."""
    return "failed" in row["deq"] and not any("failed" in row[way] for way in ("eager", "inductor"))


def wrong(row: Row) -> bool:
    """Further from the truth than a user would accept, and than the user's own run is."""
    ours, own = row["deq"].get("error"), row["eager"].get("error")
    if ours is None or own is None:
        return False
    limits = {"value": WRONG_VALUE, "gradient": WRONG_GRADIENT}
    return any(not ours[what] <= max(limit, TIMES_ITS_OWN * own[what]) for what, limit in limits.items())


def ratio(row: Row, what: str) -> float | None:
    ours, theirs = row["deq"].get(what), row["inductor"].get(what)
    return ours / theirs if ours and theirs else None


def slower(row: Row) -> bool:
    """By more than 3 %, and by more than the steps scatter: the quartiles do not overlap."""
    ours, theirs = (row[way].get("quartiles_ms") for way in ("deq", "inductor"))
    apart = not (ours and theirs) or ours[0] > theirs[-1]
    return (ratio(row, "step_ms") or 0.0) > SLOWER and apart


def dearer(row: Row) -> bool:
    return (ratio(row, "first_cpu_s") or 0.0) > DEARER


def eleven(row: Row) -> float | None:
    """CPU time of the first step and the ten after it, over Inductor's."""
    ours, theirs = (
        row[way].get("warm_cpu_s") and row[way]["first_cpu_s"] + row[way]["warm_cpu_s"] for way in ("deq", "inductor")
    )
    return ours / theirs if ours and theirs else None


def dearer_after_all(row: Row) -> bool:
    """The same of the first eleven steps: nobody is to be told of a cheap first step whose compilation is only put off."""
    return (eleven(row) or 0.0) > DEARER


def reason(row: Row) -> str:
    """Why there is no region, as `explain` puts it: the first reason, else the first graph break."""
    if "failed" in row["explain"]:
        return f"explain failed: {row['explain']['failed']}"
    reasons, breaks = row["explain"].get("reasons", []), row["explain"].get("graph_breaks", [])
    if reasons:
        return " · ".join(reasons)
    return f"no reason given; Dynamo: {breaks[0][:160]}" if breaks else "no reason given"


def number(value: float | None, spec: str, times: str = "") -> str:
    return "–" if value is None else format(value, spec) + times


def pair(row: Row, what: str) -> str:
    """deq's error, and in brackets that of the user's own run."""
    ours, own = row["deq"].get("error"), row["eager"].get("error")
    return f"{number(ours and ours[what], '.0e')} ({number(own and own[what], '.0e')})"


def line(row: Row) -> list[Any]:
    graphs = "{} / {}".format(*(row[way].get("graphs", "–") for way in ("inductor", "deq")))
    breaks = "{} / {}".format(*(row[way].get("breaks", "–") for way in ("inductor", "deq")))
    times = " / ".join(number(row[way].get("step_ms"), ".1f") for way in ("eager", "inductor", "deq"))
    marks = [text for text, holds in (("**crash**", crashed(row)), ("**wrong**", wrong(row))) if holds]
    first = number(ratio(row, "first_cpu_s"), ".2f", "×")
    step = number(ratio(row, "step_ms"), ".2f", "×")
    all_eleven = number(eleven(row), ".2f", "×")
    return [
        row["name"],
        row["iteration"],
        " ".join([found(row), *marks]),
        graphs,
        breaks,
        pair(row, "value"),
        pair(row, "gradient"),
        times,
        f"**{step}**" if slower(row) else step,
        f"**{first}**" if dearer(row) else first,
        f"**{all_eleven}**" if dearer_after_all(row) else all_eleven,
    ]


def counts(rows: list[Row]) -> str:
    none = sum(not row["deq"].get("regions") for row in rows)
    solved = sum(map(replaced, rows))
    return (
        f"{len(rows)} models of {len({row['repository'] for row in rows})} repositories or packages: "
        f"{solved} have a region that is solved or followed, {len(rows) - solved - none} only such as are kept, {none} none; "
        f"{sum(map(wrong, rows))} wrong, {sum(map(crashed, rows))} crashed; {sum(map(slower, rows))} more than 3 % slower than "
        f"Inductor, {sum(map(dearer, rows))} with a first step above 1.25 times its, {sum(map(dearer_after_all, rows))} with "
        "first eleven above that."
    )


def origins(rows: list[Row]) -> str:
    """Where each model comes from, and the commit of ours that its row was measured with."""
    lines = []
    for row in rows:
        where = f"PyPI, {row.get('version')}" if row.get("version") else f"`{row['commit'][:12]}`"
        ours = f"`{row['commit_of_ours']}`" if row.get("commit_of_ours") else "unknown"
        lines.append([row["name"], row["repository"], where, row["licence"], ours])
    return tabulate(
        lines, headers=["model", "repository", "version", "licence", "measured at"], tablefmt="github", disable_numparse=True
    )


def reasons(rows: list[Row]) -> str:
    """One line a model: verbatim what `explain` says of what was left alone, and what failed."""
    lines = []
    for row in rows:
        said = [f"{way}: {row[way]['failed']}" for way in ("truth", "eager", "inductor", "deq") if "failed" in row[way]]
        if not replaced(row) or row["explain"].get("reasons"):
            said.append(reason(row))
        said += [note for region in row["deq"].get("regions", []) for note in region["notes"]]
        if said:
            lines.append(f"- **{row['name']}**: " + "; ".join(dict.fromkeys(said)).replace("|", "\\|"))
    return "\n".join(lines)


TEXT = """# Public models, unmodified

Made by `python -m bench reach --sources FOLDER`; `--table` writes this page anew from `bench/results/reach.json`, and nothing on
it is written by hand. FOLDER holds clones of the repositories below at the commits named; the command prints how to make those
that are missing. None of their code is here.

{counts}

Each model is made small, seeded, and run as published, with `torch.compile(backend="deq")` at its defaults.

- Errors are relative, of the first step, against the same weights in float64 with the model's own solver set to converge; in
  brackets that of the user's own float32 run at the user's own settings. **wrong**: above {value:g} in value or {gradient:g} in
  the gradients, and above three times the user's own. A crash that Inductor shares stands in the list below only.
- Step: forward and backward, eager / Inductor / deq, process CPU time, one thread, medians of steps taken in turns from the
  tenth on.
- First step: its CPU time over Inductor's, cold cache, both compilers started before. First eleven: the same with the ten steps
  after it. In those a graph whose loops are all kept is compiled again, by Inductor alone, and one of which it was not known in
  the first step what becomes of its loops is compiled at all.
- Graphs and breaks: Inductor / deq, after all steps.
- Bold: more than 3 % slower than Inductor with quartiles that do not overlap, or more than 1.25 times its first step or its
  first eleven.

{main}

{machine}

## What is said of what was left alone

{reasons}

## Where they come from

{origins}
"""


def page(head: Row, rows: list[Row]) -> str:
    main = tabulate([line(row) for row in rows], headers=HEADERS, tablefmt="github", disable_numparse=True)
    where = f"{machine.one_line(head['machine'])}; {head['date'][:10]}, the commit of each row in the last table"
    return TEXT.format(
        counts=counts(rows),
        value=WRONG_VALUE,
        gradient=WRONG_GRADIENT,
        main=main,
        machine=where,
        reasons=reasons(rows),
        origins=origins(rows),
    )
