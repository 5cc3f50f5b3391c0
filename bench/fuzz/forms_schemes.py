"""Forms of the grammar (forms.py): how an iterate is made of those before it."""

from __future__ import annotations

SCHEMES: dict[str, str] = {
    "plain": """
z = {z0}
for _ in range(N):
    z = self.f(z, {u})
""",
    "damped": """
z = {z0}
for _ in range(N):
    z = 0.4 * z + 0.6 * self.f(z, {u})
""",
    "residual_form": """
z = {z0}
for _ in range(N):
    g = self.f(z, {u}) - z
    z = z + 0.5 * g
return z, g
""",
    "momentum": """
z = old = {z0}
for _ in range(N):
    z, old = self.f(z, {u}) + 0.2 * (z - old), z
""",
    "velocity": """
z, v = {z0}, torch.zeros_like(x)
for _ in range(N):
    v = 0.3 * v + 0.5 * (self.f(z, {u}) - z)
    z = z + v
return z, v
""",
    "nesterov": """
z = old = {z0}
for i in range(N):
    y = z + 0.2 * (z - old)
    old = z
    z = self.f(y, {u})
""",
    "third_order": """
z = a = b = {z0}
for _ in range(N):
    z, a, b = self.f(z, {u}) + 0.1 * b, z, a
""",
    "last_residual": """
z = {z0}
for _ in range(N):
    new = self.f(z, {u})
    residual = (new - z).norm()
    z = new
return z, residual
""",
    "second_last": """
z = {z0}
for _ in range(N):
    old = z
    z = self.f(z, {u})
return z, 0.5 * old
""",
    "last_inner": """
z = {z0}
for _ in range(N):
    h = torch.tanh(self.f(z, {u}))
    z = 0.5 * h + 0.1 * {u}
return z + h
""",
    "special_first": """
z = torch.tanh(self.f({z0}, {u}))
for i in range(N):
    if i == 0:
        z = self.g(z, {u})
    else:
        z = self.f(z, {u})
""",
    "special_last": """
z = {z0}
for i in range(N):
    z = self.f(z, {u})
    if i == N - 1:
        z = z + 0.5 * self.g(z, {u})
""",
    "reset": """
z = {z0}
for i in range(2 * N):
    if i == N:
        z = torch.zeros_like(z)
    z = self.f(z, {u})
""",
    "nested": """
z = {z0}
for _ in range(N // 2):
    y = z
    for _ in range(3):
        y = self.f(y, {u})
    z = 0.5 * self.g(y, z)
""",
    "nested_long": """
z = {z0}
for _ in range(3):
    for _ in range(N):
        z = self.f(z, {u})
    z = torch.tanh(z)
""",
    "module_list": """
z = {z0}
for layer in [self.f, self.g] * (N // 2):
    z = layer(z, {u})
""",
    "parity": """
z = {z0}
for i in range(N):
    z = self.f(z, {u}) if i % 2 == 0 else self.g(z, {u})
""",
    "swapped_injections": """
z, y = {z0}, x.flip(0)
for i in range(N):
    z = self.f(z, {u} if i % 2 else y)
""",
}
