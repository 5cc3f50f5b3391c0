"""Places where there is nothing to solve with: fake and meta tensors, tracers, odd states; and what fixed_point says there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from deq_compile import explain, fixed_point
from tests.helpers import compiled, largest_error, value_and_grads

W = torch.linspace(-0.3, 0.3, 16).reshape(4, 4)
X = torch.linspace(-1, 1, 8).reshape(2, 4)


def declared(x: Tensor, weight: Tensor = W, **options: Any) -> Tensor:
    return fixed_point(lambda z: torch.tanh(z @ weight + x), torch.zeros_like(x), **options)


@pytest.mark.parametrize("batch", [1, 3])
def test_fake_tensors_have_a_shape(batch: int) -> None:
    with FakeTensorMode() as mode:
        x, weight = torch.randn(batch, 4), torch.randn(4, 4, requires_grad=True)
        found = declared(x, weight)
        assert (found.shape, found.dtype, found.requires_grad) == ((batch, 4), torch.float32, True)
        found.sum().backward()
        assert weight.grad is not None
        with torch.no_grad():
            assert not declared(x, weight).requires_grad
    outside = declared(mode.from_tensor(X), mode.from_tensor(W))  # no mode at work
    assert outside.shape == (2, 4)


def test_meta_tensors_have_a_shape() -> None:
    calls = []

    def f(state: dict[str, Tensor]) -> dict[str, Tensor]:
        calls.append(state)
        return {"a": torch.tanh(state["b"]), "b": state["a"].cos()}

    start = {name: torch.zeros(5, 3, device="meta", dtype=torch.bfloat16) for name in "ab"}
    found = fixed_point(f, start)
    assert {name: (t.shape, t.dtype, t.device.type) for name, t in found.items()} == dict.fromkeys(
        "ab", ((5, 3), torch.bfloat16, "meta")
    )
    assert len(calls) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("trace", "who"),
    [
        (lambda: make_fx(lambda x: declared(x))(X), "make_fx"),
        (lambda: make_fx(lambda x: declared(x), tracing_mode="fake")(X), "make_fx"),
        (lambda: torch.jit.trace(declared, (X,)), "torch.jit.trace"),
    ],
)
def test_a_tracer_gets_one_sentence(trace: Callable[[], Any], who: str) -> None:
    """Neither f once nor the steps of one solve may pass for the model."""
    with pytest.raises(RuntimeError, match=rf"fixed_point cannot be traced by {who}: .*torch.export.export, which makes"):
        trace()


def test_another_backend_says_why_its_graph_ends() -> None:
    with pytest.raises(torch._dynamo.exc.Unsupported, match="only backend='deq' makes it a part of the graph"):
        torch.compile(declared, backend="eager", fullgraph=True)(X)


ODD: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "f": (lambda: fixed_point(3, X), TypeError, "expected f to be a function of the state, got int"),  # type: ignore[arg-type]
    "None": (lambda: fixed_point(lambda z: None, X), ValueError, "got NoneType"),  # type: ignore[arg-type,return-value]
    "tuple": (lambda: fixed_point(lambda z: (z, z), X), ValueError, "structure of z0"),  # type: ignore[arg-type,return-value]
    "device": (lambda: fixed_point(lambda z: z.to("meta"), X), ValueError, "device of its state.*got .* on meta"),
    "sparse": (lambda: fixed_point(lambda z: z, X.to_sparse()), TypeError, "plain dense tensors, got torch.sparse_coo"),
    "sparse image": (lambda: fixed_point(lambda z: z.to_sparse(), X), ValueError, "torch.sparse_coo"),
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_map_of_its_state(name: str) -> None:
    call, kind, text = ODD[name]
    with pytest.raises(kind, match=text):
        call()


@pytest.mark.parametrize(("result", "text"), [(lambda z: None, "None"), (lambda z: (z, z), "tuple"), (3, "int")])
@pytest.mark.parametrize("fullgraph", [True, False])
def test_what_is_no_map_of_its_state_when_compiled(result: Any, text: str, fullgraph: bool) -> None:
    run, _ = compiled(lambda x: fixed_point(result, x), fullgraph=fullgraph)
    with pytest.raises(Exception, match=f"fixed_point: expected f to ([^_]*{text}|return the structure)"):
        run(X)


def test_states_of_nested_and_wrapped_tensors_are_refused() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    with pytest.raises(TypeError, match="plain dense tensors, got TwoTensor"):
        fixed_point(lambda z: 0.5 * z, TwoTensor(X, X))  # type: ignore[return-value]


@pytest.mark.parametrize("shape", [(3, 0), (0, 0), (0, 4), (2, 0, 5)])
def test_a_state_without_elements(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, requires_grad=True)

    def loop(x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(20):
            z = torch.tanh(0.5 * z + x)
        return z

    for run in (compiled(loop)[0], lambda x: fixed_point(lambda z: torch.tanh(0.5 * z + x), torch.zeros_like(x))):
        found = run(x)
        assert found.shape == shape
        (grad,) = torch.autograd.grad(found.sum(), x)
        assert grad.shape == shape


NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "std": lambda h: h / (h.std(-1, keepdim=True) + 1e-5),
    "std of all": lambda h: h / (h.std(unbiased=False) + 1e-5),
    "std_mean": lambda h: h / torch.std_mean(h, -1, keepdim=True)[0],
    "norm": lambda h: h / h.norm(dim=-1, keepdim=True),
    "norm of order 3": lambda h: h / h.norm(3, dim=-1, keepdim=True),
    "renorm": lambda h: h.renorm(2, 0, 1.0),
    "cdist": lambda h: torch.cdist(h, h).softmax(-1) @ h,
    "masked": lambda h: h.masked_fill(h > 3, 0.0).cumsum(-1) / 16,
}


class Normed(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.W, self.norm = nn.Linear(8, 8), NORMS[name]
        nn.init.orthogonal_(self.W.weight, gain=0.3)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(40):
            z = 0.3 * torch.tanh(self.norm(self.W(z) + x))
        return z


@pytest.mark.parametrize("name", NORMS)
def test_a_body_whose_derivative_writes_in_place(name: str) -> None:
    model, x = Normed(name).double(), torch.randn(4, 8, dtype=torch.float64)
    run, report = compiled(model, inner="aot_eager", tol=1e-8, backward_tol=1e-7)
    found = value_and_grads(run, model, x)
    assert largest_error(found, value_and_grads(model, model, x)) < 1e-5
    assert [region.status for region in report.regions] == ["solve"]


def by_rfft(z: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(torch.fft.irfft(torch.fft.rfft(z) * 0.3, n=8) + x)


def by_mask(z: Tensor, x: Tensor) -> Tensor:
    return torch.where(z > 0, 0.3, -0.2) * torch.sin(x) + x


def by_complex(z: Tensor, x: Tensor) -> Tensor:
    return torch.view_as_real(torch.view_as_complex(z.reshape(*z.shape[:-1], -1, 2)) * 0.4j).flatten(-2) + torch.sin(x)


def by_integer(z: Tensor, x: Tensor) -> Tensor:
    return 0.1 * z.to(torch.int32) + x


@pytest.mark.parametrize("body", [by_rfft, by_mask, by_complex, by_integer])
def test_a_body_that_begins_with_what_is_no_state(body: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Among the places where a loop can be cut, those where the state is real floating point come first."""

    def model(x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        for _ in range(40):
            z = body(z, x)
        return z

    x = torch.randn(2, 8)
    report = explain(model, inner="eager")(x)
    assert [region.states for region in report.regions] == [((("2", "8"), "float32"),)]
    torch.testing.assert_close(compiled(model)[0](x), model(x), rtol=1e-4, atol=1e-5)
