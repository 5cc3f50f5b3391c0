"""accelerate: what `docs/trainers.md` says works and what it says does not."""

from __future__ import annotations

import pytest

from tests.examples.loading import example

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of libraries
pytest.importorskip("accelerate", reason="the extra `trainers` is not installed")
OPTIONS = {"inner": "eager"}


@pytest.fixture(autouse=True)
def fresh_state() -> None:
    """accelerate remembers precision and devices for the whole process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)


def test_it_learns_by_solving() -> None:
    accuracy, solves = example("accelerate_loop").main(options=OPTIONS)
    trained = [solve for solve in solves if solve.vjps is not None]
    assert accuracy > 0.9
    assert len(trained) == 7 * (1437 // 64)
    assert {solve.status for solve in solves} == {"solve"}
    assert sum(solve.iterations for solve in trained) < 15 * len(trained)  # less than a third of the loop's


def test_in_bf16() -> None:
    _, solves = example("accelerate_loop").main(epochs=1, precision="bf16", options=OPTIONS)
    assert len([solve for solve in solves if solve.vjps is not None]) == 1437 // 64


def test_its_list_of_backends_is_closed() -> None:
    from accelerate import Accelerator

    with pytest.raises(ValueError, match="'DEQ' is not a valid DynamoBackend"):
        Accelerator(dynamo_backend="deq", cpu=True)
