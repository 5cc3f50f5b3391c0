"""The grammar's sentences: the loops that users write around a body, as source text of `forward`.

`self.f(z, x)` and `self.g(z, x)` are random bodies that keep the shape of z; `{z0}` is an initial state, `{u}` the
injection, N the count. Lines before `return` define `z`, and what else is returned.
"""

from __future__ import annotations

FORMS: dict[str, str] = {
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
    "early_value": """
z = {z0}
for i in range(N):
    z = self.f(z, {u})
    if i == 2:
        early = z
return z, early
""",
    "trajectory": """
z, zs = {z0}, []
for _ in range(N):
    z = self.f(z, {u})
    zs.append(z)
return z, torch.stack(zs).mean(0)
""",
    "last_three": """
z, zs = {z0}, []
for _ in range(N):
    z = self.f(z, {u})
    zs.append(z)
return zs[-1] + 0.3 * zs[-2] + 0.1 * zs[-3]
""",
    "residual_list": """
z, rs = {z0}, []
for _ in range(N):
    new = self.f(z, {u})
    rs.append((new - z).norm())
    z = new
return z, torch.stack(rs)
""",
    "hoisted_used": """
z = {z0}
for _ in range(N):
    inj = torch.tanh(self.h(x))
    z = self.f(z, inj)
return z * inj
""",
    "inject_inside": """
z = {z0}
for _ in range(N):
    z = self.f(z, torch.tanh(self.h(x)))
""",
    "constant_list": """
z = {z0}
for a in [0.5] * (N - 2) + [0.4, 0.3]:
    z = (1 - a) * z + a * self.f(z, {u})
""",
    "step_size": """
z = {z0}
for i in range(N):
    z = z + (self.f(z, {u}) - z) / (i + 1)
""",
    "sequence": """
z, xs = {z0}, torch.stack([x * (0.1 * i) for i in range(N)])
for i in range(N):
    z = self.f(z, xs[i])
""",
    "distinct": """
z = {z0}
for i in range(N):
    z = self.f(z * self.many[i], {u})
""",
    "counter": """
z, t = {z0}, torch.zeros((), dtype=torch.int64)
for _ in range(N):
    z = self.f(z, {u})
    t = t + 1
return z, t
""",
    "time_tensor": """
z, t = {z0}, torch.zeros(())
for _ in range(N):
    z = self.f(z, {u}) + 0.01 * t.to(x.dtype)
    t = t + 0.1
return z, t
""",
    "mask_invariant": """
z, mask = {z0}, x > 0
for _ in range(N):
    z = torch.where(mask, self.f(z, {u}), 0.5 * z)
""",
    "mask_carried": """
z, mask = {z0}, x > 0
for _ in range(N):
    z = self.f(z, {u}) * mask
    mask = mask & (z < 5)
return z, mask
""",
    "index_carried": """
z, order = {z0}, torch.arange(x.shape[-1])
for _ in range(N):
    z = self.f(z, {u})[..., order]
    order = order.flip(0)
""",
    "gradient_free": """
with torch.no_grad():
    z = {z0}
    for _ in range(N):
        z = self.f(z, {u})
return self.f(z, {u})
""",
    "no_grad_inside": """
z = {z0}
for _ in range(N):
    with torch.no_grad():
        m = z.mean()
    z = self.f(z, {u}) - 0.1 * m
""",
    "truncated": """
z = {z0}
for i in range(N):
    if i == N // 2:
        z = z.detach()
    z = self.f(z, {u})
""",
    "detached_state": """
z = {z0}
for _ in range(N):
    z = self.f(z.detach(), {u})
""",
    "in_place_step": """
z = {z0}.clone()
for _ in range(N):
    z += 0.5 * (self.f(z.clone(), {u}) - z)
""",
    "in_place_state": """
z = torch.zeros_like(x)
for _ in range(N):
    z = z.mul_(0.5).add_(0.5 * self.f(z, {u}))
""",
    "in_place_kept_alias": """
z = 0.5 * x
first = z.view(-1)
for _ in range(N):
    z += 0.5 * (self.f(z.clone(), {u}) - z)
return z, first.sum()
""",
    "buffer_count": """
z = {z0}
for _ in range(N):
    self.count += 1
    z = self.f(z, {u})
""",
    "buffer_average": """
z = {z0}
for _ in range(N):
    z = self.f(z, {u})
    self.count.mul_(0.9).add_(z.detach().mean(), alpha=0.1)
""",
    "buffer_state": """
z = {z0}
for _ in range(N):
    z = self.f(z, {u} + self.count)
self.count.copy_(z.detach().mean())
""",
    "write_out": """
z, out = {z0}, torch.zeros(N, *x.shape, dtype=x.dtype)
for i in range(N):
    z = self.f(z, {u})
    out[i] = z.detach()
return z, out
""",
    "dropout": """
z = {z0}
for _ in range(N):
    z = F.dropout(self.f(z, {u}), 0.1, True)
""",
    "noise": """
z = {z0}
for _ in range(N):
    z = self.f(z, {u}) + 0.01 * torch.randn_like(x)
""",
    "fixed_noise": """
z, mask = {z0}, F.dropout(torch.ones_like(x), 0.2, True)
for _ in range(N):
    z = self.f(z, {u}) * mask
""",
    "batch_norm": """
z = {z0}
for _ in range(N):
    z = 0.5 * F.batch_norm(self.f(z, {u}), self.mean, self.var, training=True)
""",
    "batch_norm_eval": """
z = {z0}
for _ in range(N):
    z = 0.5 * F.batch_norm(self.f(z, {u}), self.mean, self.var, training=False)
""",
    "checkpoint": """
z = {z0}
for _ in range(N):
    z = checkpoint(self.f, z, {u}, use_reentrant=False)
""",
    "two_loops": """
z = {z0}
for _ in range(N):
    z = self.f(z, {u})
y, w = torch.tanh(z), torch.zeros_like(x)
for _ in range(N):
    w = self.g(w, y)
return w, z
""",
    "same_body_twice": """
z = {z0}
for _ in range(N):
    z = self.f(z, {u})
y = torch.zeros_like(x)
for _ in range(N):
    y = self.f(y, z)
return y
""",
    "continued": """
z = {z0}
for _ in range(N):
    z = self.f(z, {u})
z = z + 0.1
for _ in range(N // 2):
    z = self.f(z, {u})
""",
    "per_sample": """
rows = []
for b in range(x.shape[0]):
    z = torch.zeros_like(x[b : b + 1])
    for _ in range(N // 2):
        z = self.f(z, x[b : b + 1])
    rows.append(z)
z = torch.cat(rows)
""",
    "threshold": """
z = v = torch.zeros_like(x)
for _ in range(N):
    v = 0.8 * v + self.f(z, {u})
    z = (v > 0.5).to(x.dtype)
    v = v - 0.5 * z
return v + z
""",
    "quantised": """
z = {z0}
for _ in range(N):
    z = torch.round(8 * self.f(z, {u})) / 8 + 0.0 * z
""",
    "autocast": """
z = {z0}
for _ in range(N):
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
        z = self.f(z, {u})
""",
    "tested_break": """
z = {z0}
for _ in range(2 * N):
    new = self.f(z, {u})
    if (new - z).norm() < 1e-10 * new.norm():
        break
    z = new
""",
    "tested_item": """
z = {z0}
for _ in range(2 * N):
    old, z = z, self.f(z, {u})
    if (z - old).abs().max().item() < 1e-10:
        break
""",
    "tested_while": """
z, gap, k = {z0}, torch.ones((), dtype=x.dtype), 0
while gap > 1e-10 and k < 2 * N:
    old, z, k = z, self.f(z, {u}), k + 1
    gap = (z - old).norm() / z.norm()
""",
    "tested_loosely": """
z = {z0}
for _ in range(N):
    old, z = z, self.f(z, {u})
    if (z - old).norm() < 1e-7 * z.norm():
        break
return torch.tanh(z)
""",
    "called": """
with torch.no_grad():
    z = iterate(lambda z: self.f(z, {u}), {z0}, 60, 1e-10)
z = self.f(z, {u})
""",
    "called_plainly": """
z = iterate(lambda z: self.f(z, {u}), {z0}.detach(), 60, 1e-10).detach()
z = self.f(z, {u}) + 0.0 * z
""",
    "broadcast_state": """
z = torch.zeros_like(x[:1])
for _ in range(N):
    z = self.f(z + torch.zeros_like(x), {u})
""",
}
