"""Two processes with sharded parameters train as one does on their batches together."""

from __future__ import annotations

import pytest

from tests.examples.loading import example, two_ranks

pytest.importorskip("sklearn")
PARAMETERS = 2 * (64 * 64 + 64) + 10 * 64 + 10


def test_two_ranks_are_one_process() -> None:
    said = two_ranks("fsdp2")
    assert [s["held"] for s in said] == [PARAMETERS // 2] * 2


def test_a_plain_process_is_told_how_to_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match=r"Fix: torchrun --nproc-per-node 2 examples/fsdp2\.py"):
        example("fsdp2").main()
