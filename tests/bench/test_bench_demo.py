"""The demo: what it writes is what its table is made of."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from bench import demo
from bench.__main__ import main


def arguments(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return parser.parse_args(words)


def finished(tmp_path: Path, *rows: str) -> dict[str, Any]:
    """Rows as their own processes would have left them, of five small steps: an interrupted run to take up again."""
    args = arguments("--steps", "5", "--batch", "16", "--width", "32", "--loop", "6", "--threads", "1")
    results = {row: demo.train(args, row) for row in rows}
    for row, result in results.items():
        (tmp_path / f"{row}.json").write_text(json.dumps(result))
    return results


def test_the_rows_are_written_as_they_were_measured(tmp_path: Path, capsys: Any) -> None:
    results = finished(tmp_path, "eager")
    words = ["--steps", "5", "--batch", "16", "--width", "32", "--loop", "6", "--threads", "1", "--resume", "--rows", "eager"]
    files = ["--out", str(tmp_path), "--plot", str(tmp_path / "plot.png"), "--json", str(tmp_path / "new" / "demo.json")]
    assert main(["demo", *words, *files]) == 0
    stored = json.loads((tmp_path / "new" / "demo.json").read_text())
    assert set(stored) == {"date", "machine", "versions", "commit", "settings", "rows"}
    assert stored["rows"] == json.loads(json.dumps(results))
    assert len(stored["rows"]["eager"]["seconds"]) == stored["settings"]["steps"] == 5
    assert stored["machine"]["threads"] == stored["settings"]["threads"] == 1
    assert demo.format_table(stored["rows"]) in capsys.readouterr().out


def test_the_course_of_the_solves_is_drawn(tmp_path: Path) -> None:
    words = ["--steps", "3", "--batch", "16", "--width", "32", "--threads", "1", "--options", '{"inner": "eager"}']
    result = demo.train(arguments(*words, "--out", str(tmp_path)), "deq")
    assert result["solves"]["solves"] == 3
    assert (tmp_path / demo.SOLVES).read_bytes().startswith(b"\x89PNG")


def test_a_row_that_failed_is_not_written(tmp_path: Path) -> None:
    args = arguments("--json", str(tmp_path / "demo.json"))
    head = {"date": "", "machine": {}, "versions": {}, "commit": ""}
    demo.store(args, head, {"eager": {"seconds": [1.0]}, "deq": {"error": "no compiler"}})
    assert list(json.loads(args.json.read_text())["rows"]) == ["eager"]
