"""Two processes train as one does on their batches together."""

from __future__ import annotations

import pytest

from tests.examples.loading import example, two_ranks

pytest.importorskip("sklearn")


def test_two_ranks_are_one_process() -> None:
    two_ranks("ddp")


def test_a_plain_process_is_told_how_to_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match=r"Fix: torchrun --nproc-per-node 2 examples/ddp\.py"):
        example("ddp").main()
