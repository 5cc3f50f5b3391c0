"""Forms of the grammar (forms.py): what a state is made of."""

from __future__ import annotations

STATES: dict[str, str] = {
    "two_states": """
z, w = {z0}, torch.zeros_like(x)
for _ in range(N):
    z = self.f(z, w + {u})
    w = self.g(w, z)
return z + w
""",
    "two_states_jacobi": """
state = ({z0}, torch.ones_like(x))
for _ in range(N):
    state = (self.f(state[0], state[1]), self.g(state[1], {u} + state[0]))
return state
""",
    "dict_state": """
s = {{"z": {z0}, "w": 0.5 * x}}
for _ in range(N):
    z = self.f(s["z"], {u})
    s = {{"w": 0.5 * self.g(s["w"], z), "z": z}}
z = s["z"]
return z, s["w"]
""",
    "dataclass_state": """
s = State({z0}, torch.zeros_like(x))
for _ in range(N):
    s = State(self.f(s.z, s.w), 0.5 * self.g(s.w, {u}))
return s.z - s.w
""",
    "list_state": """
zs = [{z0}, x, torch.zeros_like(x)]
for _ in range(N):
    total = sum(zs)
    zs = [self.f(v, 0.3 * total + {u}) for v in zs]
return torch.stack(zs).sum(0)
""",
    "uncoupled": """
z, w = {z0}, torch.zeros_like(x)
for _ in range(N):
    z = self.f(z, {u})
    w = self.g(w, {u})
return z * w
""",
    "mixed_shapes": """
z, m = {z0}, torch.zeros_like(x).mean(-1)
for _ in range(N):
    z = self.f(z, {u} + m.unsqueeze(-1))
    m = 0.3 * z.mean(-1) + 0.2 * m.sin()
return z, m
""",
    "summary_state": """
z, m = {z0}, torch.zeros(x.shape[-1], dtype=x.dtype)
for _ in range(N):
    z = self.f(z, {u} + m)
    m = 0.3 * z.flatten(0, -2).mean(0)
return z, m
""",
    "stacked_state": """
s = torch.stack([{z0}, torch.zeros_like(x)])
for _ in range(N):
    z, w = s.unbind(0)
    s = torch.stack([self.f(z, w), 0.5 * self.g(w, {u})])
z = s[0] + s[1]
""",
    "view_state": """
z = torch.cat([{z0}, x], -1)[..., : x.shape[-1]]
for _ in range(N):
    z = torch.cat([self.f(z, {u}), z], -1)[..., : x.shape[-1]]
""",
    "transposed_state": """
z = {z0}.transpose(0, -1)
for _ in range(N):
    z = self.f(z.transpose(0, -1), {u}).transpose(0, -1)
""",
    "flat_state": """
z = {z0}.flatten()
for _ in range(N):
    z = self.f(z.view(x.shape), {u}).flatten()
""",
    "accumulated": """
z, total = {z0}, torch.zeros_like(x)
for _ in range(N):
    z = self.f(z, {u})
    total = total + z
return z, total / N
""",
    "averaged": """
z = avg = {z0}
for _ in range(N):
    z = self.f(z, {u})
    avg = 0.5 * avg + 0.5 * z
return avg
""",
    "idempotent_state": """
z, c = {z0}, x
for _ in range(N):
    c = torch.relu(c)
    z = self.f(z, c)
return z, 0.1 * c
""",
    "carried_unchanged": """
z, c = {z0}, 0.5 * x
for _ in range(N):
    z, c = self.f(z, c), c.clone()
""",
    "conserved": """
z = {z0} + x
for _ in range(N):
    z = z - 0.4 * (z - torch.roll(z, 1, -1)) - 0.1 * (z - torch.roll(z, 3, -1))
return z + 0.1 * self.f(z, {u})
""",
}
