"""Forms of the grammar (forms.py): what a loop reads, writes, keeps and is surrounded by, and how it ends."""

from __future__ import annotations

SURROUNDINGS: dict[str, str] = {
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
