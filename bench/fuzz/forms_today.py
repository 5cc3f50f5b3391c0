"""Forms of the grammar (forms.py): what loops of today tell, and how they attach a gradient; and bodies that change later on.

`HELPERS` are functions that a form may call, by name; a program holds those that it names.
"""

from __future__ import annotations

TODAY: dict[str, str] = {
    "counter_told": """
z, k = {z0}, 0
for k in range(3 * N):
    new = self.f(z, {u})
    gap = (new - z).norm() / new.norm()
    z = new
    if gap < 1e-10:
        break
self.steps = k + 1
""",
    "residuals_told": """
z, self.trace, self.best = {z0}, [], None
for _ in range(3 * N):
    new = self.f(z, {u})
    self.trace.append(((new - z).norm() / new.norm()).item())
    z = new
    if self.trace[-1] < 1e-10:
        break
self.last = self.trace[-1]
""",
    "least_iterations": """
z = {z0}
for k in range(3 * N):
    new = self.f(z, {u})
    gap = ((new - z).norm() / new.norm()).item()
    z = new
    if k >= 4 and gap < 1e-10:
        break
""",
    "integer_state": """
s = dict(z={z0}, k=torch.zeros((), dtype=torch.int32))
for _ in range(N):
    s = dict(z=self.f(s["z"], {u}), k=s["k"] + 1)
return s["z"], s["k"]
""",
    "masked": """
z, done = {z0}, torch.zeros(x.shape[0], dtype=torch.bool)
for _ in range(3 * N):
    new = self.f(z, {u})
    gap = (new - z).detach().flatten(1).norm(dim=1)
    z = torch.where(done.view(-1, *[1] * (x.dim() - 1)), z, new)
    done = done | (gap < 1e-10)
    if done.all():
        break
""",
    "informed": """
with torch.no_grad():
    z, self.info = informed(lambda z: self.f(z, {u}), {z0}, 90, 1e-10)
z = self.f(z, {u})
""",
    "attached": """
with torch.no_grad():
    z, self.info = informed(lambda z: self.f(z, {u}.detach()), {z0}, 90, 1e-10)
start = z.detach().requires_grad_()
z = Attach.apply(z, dict(start=start, image=self.f(start, {u}), terms=0), {u}, *self.parameters())
""",
    "attached_terms": """
with torch.no_grad():
    z, self.info = informed(lambda z: self.f(z, {u}.detach()), {z0}, 90, 1e-10)
start = z.detach().requires_grad_()
z = Attach.apply(z, dict(start=start, image=self.f(start, {u}), terms=2), {u}, *self.parameters())
""",
    "attached_elsewhere": """
with torch.no_grad():
    z, self.info = informed(lambda z: self.f(z, {u}.detach()), {z0}, 90, 1e-10)
start = z.detach().requires_grad_()
z = Attach.apply(2 * z, dict(start=start, image=self.f(start, {u}), terms=0), {u}, *self.parameters())
""",
    "hooked": """
with torch.no_grad():
    z, self.info = informed(lambda z: self.f(z, {u}), {z0}, 90, 1e-10)
z = self.f(z, {u})
start = z.detach().clone().requires_grad_(True)
image = self.f(start, {u})
z.register_hook(lambda q: adjoint(image, start, q, 0))
""",
    "hooked_once": """
with torch.no_grad():
    z, self.info = informed(lambda z: self.f(z, {u}), {z0}, 90, 1e-10)
z = self.f(z, {u})
start = z.detach().clone().requires_grad_(True)
image = self.f(start, {u})
z.register_hook(lambda q: adjoint(image, start, q, 2))
""",
    "changed_later": """
z = {z0}
for k in range(3 * N):
    new = self.f(z, {u}) * (1.0 if k < 15 else 0.5)
    gap = (new - z).norm()
    z = new
    if gap < 1e-13:
        break
""",
    "changed_later_in_a_call": """
z = {z0}
for k in range(3 * N):
    new = scheduled(k) * self.f(z, {u})
    gap = (new - z).norm()
    z = new
    if gap < 1e-13:
        break
""",
    "changed_later_by_next": """
z, rates = {z0}, iter([1.0] * 15 + [0.5] * (3 * N))
for k in range(3 * N):
    new = next(rates) * self.f(z, {u})
    gap = (new - z).norm()
    z = new
    if gap < 1e-13:
        break
""",
    "changed_later_in_a_solver": """
rates = [1.0] * 15 + [0.5] * (3 * N)
z, self.info = informed(lambda z: rates.pop(0) * self.f(z, {u}), {z0}, 2 * N, 1e-14)
""",
}

_INFORMED = """
def informed(f, z, max_iter, tol):
    gap, k = math.inf, 0
    for k in range(max_iter):
        new = f(z)
        gap = ((new - z).norm() / new.norm()).item()
        z = new
        if gap < tol:
            break
    return z, dict(rounds=k + 1, gap=gap, success=gap < tol, scheme="picard")
"""
_ADJOINT = """
def adjoint(image, start, q, terms):
    w = q
    for _ in range(terms - 1 if terms else 200):
        w, before = q + torch.autograd.grad(image, start, w, retain_graph=True)[0], w
        if not terms and (w - before).norm() < 1e-10 * w.norm():
            break
    return w
"""
_ATTACH = """
class Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, graph, x, *parameters):
        ctx.graph, ctx.inputs = graph, (x, *parameters)
        return z

    @staticmethod
    def backward(ctx, q):
        w = adjoint(ctx.graph["image"], ctx.graph["start"], q, ctx.graph["terms"])
        wanted = [t for t in ctx.inputs if t.requires_grad]
        grads = iter(torch.autograd.grad(ctx.graph["image"], wanted, w, allow_unused=True))
        return (None, None, *(next(grads) if t.requires_grad else None for t in ctx.inputs))
"""
_SCHEDULED = """
def scheduled(k):
    return 1.0 if k < 15 else 0.5
"""
# name -> source text, and the names that it calls
HELPERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "informed": (_INFORMED, ()),
    "adjoint": (_ADJOINT, ()),
    "Attach": (_ATTACH, ("adjoint",)),
    "scheduled": (_SCHEDULED, ()),
}


def helpers(text: str) -> str:
    """The source of what a program calls."""
    names = [name for name in HELPERS if f"{name}(" in text or f"{name}." in text]
    needed = {more for name in names for more in HELPERS[name][1]} | set(names)
    return "".join(f"\n{source}" for name, (source, _) in HELPERS.items() if name in needed)
