"""Where states lie in the flat matrix, and what a body is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deq_compile import explain
from deq_compile.config import Options
from deq_compile.region.body import BodySpec
from deq_compile.region.layout import Layout
from deq_compile.region.modes import Ambient
from deq_compile.region.op import solve_op
from deq_compile.region.site import RegionSpec, register, site
from tests.models.parts import Loop


@pytest.fixture(autouse=True)
def _only_once(implementation: str) -> None:
    if implementation != "native":
        pytest.skip("nothing here differs with the implementation")


@pytest.mark.parametrize("rows", [True, False])
def test_channels_lie_fastest_where_that_is_asked(rows: bool) -> None:
    shapes = (2, 3, 4, 5), (2, 7)
    image, vector = torch.randn(shapes[0]), torch.randn(shapes[1])
    layout = Layout(shapes, (torch.float32,) * 2, ((0, 1, 2, 3), (0, 1)), rows, channels_last=True)
    flat = layout.flatten([image, vector])
    assert flat.shape == ((2, 67) if rows else (1, 134))
    expected = image.permute(0, 2, 3, 1)
    torch.testing.assert_close(flat[0, :60], expected[0].reshape(-1), rtol=0, atol=0)
    inside = layout.unflatten(flat)
    assert inside[0].stride() == ((67, 1, 15, 3) if rows else (60, 1, 15, 3))
    for found in (inside, layout.outputs(flat)):
        assert torch.equal(found[0], image)
        assert torch.equal(found[1], vector)
    assert layout.outputs(flat)[0].is_contiguous()


def test_one_contiguous_image_is_no_view_of_a_matrix_with_channels_last() -> None:
    image = torch.randn(2, 3, 4, 5)
    layout = Layout(((2, 3, 4, 5),), (torch.float32,), ((0, 1, 2, 3),), True, channels_last=True)
    matrix = layout.matrix([image])
    assert torch.equal(matrix, image.permute(0, 2, 3, 1).reshape(2, 60))
    (back,) = layout.outputs(matrix)
    assert torch.equal(back, image)
    assert back.is_contiguous()
    assert back.data_ptr() != matrix.data_ptr()


def body(z: Tensor, w: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    return (torch.tanh(nn.functional.conv2d(z, w, padding=1) + x),)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("iterations", [None, 3])
def test_the_order_in_memory_changes_no_result(inner: str, iterations: int | None) -> None:
    """A solve, and a loop that is kept, whose backward evaluates again."""
    torch.manual_seed(0)
    config = Options.from_options(
        {"inner": inner, "tol": 1e-11, "backward_tol": 1e-11, "verify": "first" if iterations else "never"}
    ).resolve()
    found: list[list[Tensor]] = []
    weight, x, c = 0.1 * torch.randn(3, 3, 3, 3), torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    for channels_last in (False, True):
        spec: Any = BodySpec(body, f"conv-{inner}", Ambient.now(), inner)
        conv = register(
            RegionSpec(
                spec, (torch.float64,), ((0, 1, 2, 3),), iterations, True, config, needs=(True, True), channels_last=channels_last
            )
        )
        w, u = weight.double().requires_grad_(), x.double().requires_grad_()
        z, *_ = solve_op([torch.zeros(2, 3, 4, 5, dtype=torch.float64)], [w, u], [], conv.key)
        assert z.is_contiguous()
        (z * c).sum().backward()
        assert w.grad is not None
        assert u.grad is not None
        assert w.grad.is_contiguous()
        assert u.grad.is_contiguous()
        assert (conv.verdict == "kept") == (iterations is not None)
        found.append([z.detach(), w.grad, u.grad])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


class Cell(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.1 * self.layer(z) + x)


@pytest.mark.parametrize(
    ("layer", "inner", "expected"),
    [(nn.Conv2d(3, 3, 3, padding=1), "inductor", True), (nn.Conv2d(3, 3, 3, padding=1), "eager", False),
     (nn.ConvTranspose2d(3, 3, 3, padding=1), "inductor", True), (nn.Linear(4, 4), "inductor", False)],
)  # fmt: skip
def test_who_is_asked_for_channels_last(layer: nn.Module, inner: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("without oneDNN Inductor leaves images as they are")
    import deq_compile.backend as backend

    monkeypatch.setattr(backend, "compile_rest", lambda gm, inputs, config, mode: lambda *args: [inputs[-1]])
    torch._dynamo.reset()
    report = explain(Loop(Cell(layer)), inner=inner)(torch.randn(2, 3, 4, 4))
    (region,) = report.regions
    assert site(region.key).spec.channels_last is expected
