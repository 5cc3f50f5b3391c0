"""The grammar's words: operations a loop body is put together from, as source text.

A stage is one or more lines that read `{h}` (and the injection `{x}`, and the body's own argument `{z}`) and define
`{o}` of the same shape; `{t}` and `{s}` are names for temporaries, `{p0}`, `{p1}` modules or buffers that it registers.
Domains: "vec" (B, D), "seq" (B, T, D), "img" (B, C, H, W), "graph" (N, D) whose rows read each other.
"""

from __future__ import annotations

import dataclasses

DOMAINS = ("vec", "seq", "img", "graph")
D, T, C, H, NODES = 8, 3, 4, 4, 5
SHAPES = {"vec": (D,), "seq": (T, D), "img": (C, H, H), "graph": (D,)}  # without the first dimension


@dataclasses.dataclass(frozen=True)
class Stage:
    code: str
    params: tuple[str, ...] = ()
    domains: tuple[str, ...] = DOMAINS


_LAST = ("vec", "seq", "graph")

STAGES: dict[str, Stage] = {
    # elementwise
    "tanh": Stage("{o} = torch.tanh({h})"),
    "relu": Stage("{o} = F.relu({h})"),
    "gelu": Stage("{o} = F.gelu({h})"),
    "sigmoid": Stage("{o} = torch.sigmoid({h}) - 0.5"),
    "silu": Stage("{o} = F.silu({h})"),
    "softplus": Stage("{o} = F.softplus({h}) - 0.7"),
    "elu": Stage("{o} = F.elu({h})"),
    "leaky_relu": Stage("{o} = F.leaky_relu({h}, 0.1)"),
    "sin": Stage("{o} = {h}.sin()"),
    "clamp": Stage("{o} = {h}.clamp(-0.8, 0.9)"),
    "exp": Stage("{o} = torch.exp(-{h}.abs()) * 0.5"),
    "sqrt": Stage("{o} = torch.sqrt({h} * {h} + 0.1)"),
    "pow": Stage("{o} = 0.3 * {h} ** 2"),
    "neg": Stage("{o} = -{h}"),
    "where": Stage("{o} = torch.where({h} > 0, {h}, 0.3 * {h})"),
    "where_inj": Stage("{o} = torch.where({x} > 0, {h}, {h} * 0.1)"),
    "add": Stage("{o} = {h} + {x}"),
    "sub": Stage("{o} = {x} - {h}"),
    "mul": Stage("{o} = {h} * torch.sigmoid({x})"),
    "div": Stage("{o} = {h} / (1.0 + {x}.abs())"),
    "maximum": Stage("{o} = torch.maximum({h}, 0.2 * {x})"),
    "lerp": Stage("{o} = torch.lerp({h}, {x}, 0.4)"),
    "addcmul": Stage("{o} = torch.addcmul({h}, {x}, {h}, value=0.1)"),
    "masked_fill": Stage("{o} = {h}.masked_fill({x} > 0.5, 0.1)"),
    "detach": Stage("{o} = 0.7 * {h} + 0.3 * {h}.detach()"),
    "skip": Stage("{o} = {h} + 0.3 * {z}"),
    "constant": Stage("{o} = {h} * torch.tensor(0.5, dtype={h}.dtype)"),
    "arange": Stage("{o} = {h} + 0.01 * torch.arange({h}.shape[-1], dtype={h}.dtype)"),
    "buffer": Stage("{o} = {h} * {p0}", ("buffer",)),
    "scale": Stage("{o} = {h} * {p0}", ("parameter",)),
    "dropout_off": Stage("{o} = F.dropout({h}, 0.0)"),
    "double_use": Stage("{t} = 0.5 * {h}\n{o} = torch.cos({t}) * {t}"),
    # in place, on temporaries
    "relu_": Stage("{t} = {h} * 0.9\n{o} = F.relu({t}, inplace=True)"),
    "add_": Stage("{t} = {h} * 0.5\n{t}.add_({x})\n{o} = {t}"),
    "iadd": Stage("{o} = {h} * 0.5\n{o} += {x}"),
    "imul": Stage("{t} = {h} + {x}\n{t} *= 0.5\n{o} = {t}.tanh_()"),
    "mul_view": Stage("{t} = {h} * 0.5\n{s} = {t}.view(-1)\n{o} = {t} + 0.1\n{s}.mul_(0.5)"),
    "add_part": Stage("{o} = {h} * 0.5\n{o}[..., :2] += 0.1"),
    "setitem": Stage("{o} = {h}.clone()\n{o}[:, 0] = 0.1"),
    "setitem_inj": Stage("{o} = 0.5 * {h}\n{o}[..., :2] = {x}[..., :2]"),
    "masked_fill_": Stage("{o} = 0.5 * {h}\n{o}.masked_fill_({x} < -0.5, 0.2)"),
    "fill_new": Stage("{t} = torch.zeros_like({h})\n{t}.fill_(0.1)\n{o} = {h} * {t}"),
    "empty_copy": Stage("{t} = torch.empty_like({h})\n{t}.copy_({h})\n{o} = {t} * 0.7"),
    "clamp_": Stage("{o} = ({h} + {x}).clamp_(-0.5, 0.5)"),
    # reductions and normalisation
    "mean": Stage("{o} = {h} - 0.5 * {h}.mean(-1, keepdim=True)"),
    "sum": Stage("{o} = {h} + 0.05 * {h}.sum(1, keepdim=True)"),
    "norm": Stage("{o} = {h} / (1.0 + {h}.norm(dim=-1, keepdim=True))"),
    "std": Stage("{o} = {h} / (0.5 + {h}.std(-1, keepdim=True))"),
    "softmax": Stage("{o} = torch.softmax({h}, -1)"),
    "logsumexp": Stage("{o} = {h} - 0.3 * torch.logsumexp({h}, -1, keepdim=True)"),
    "amax": Stage("{o} = 0.5 * ({h} - {h}.amax(-1, keepdim=True))"),
    "cumsum": Stage("{o} = 0.2 * {h}.cumsum(-1)"),
    "sort": Stage("{o} = 0.5 * {h}.sort(-1).values"),
    "topk": Stage("{t}, {s} = {h}.topk(2, dim=-1)\n{o} = {h} - 0.2 * {t}.sum(-1, keepdim=True)"),
    "batch_mean": Stage("{o} = {h} - 0.3 * {h}.mean(0, keepdim=True)"),
    # moving things about
    "chunk_cat": Stage("{t}, {s} = {h}.chunk(2, -1)\n{o} = torch.cat([{s}, torch.tanh({t})], -1)"),
    "split": Stage("{t}, {s} = torch.split({h}, [1, {h}.shape[-1] - 1], dim=-1)\n{o} = torch.cat([{s} * 0.5, {t}], -1)"),
    "narrow": Stage("{o} = torch.cat([{h}.narrow(-1, 0, 2) * 0.5, {h}[..., 2:]], -1)"),
    "glu": Stage("{o} = F.glu(torch.cat([{h}, {x}], -1), -1)"),
    "stack": Stage("{o} = torch.stack([{h}, {x}], 0).mean(0)"),
    "unbind": Stage("{t}, {s} = torch.stack([{h}, {x}], -1).unbind(-1)\n{o} = 0.5 * {t} + 0.1 * {s}"),
    "roll": Stage("{o} = torch.roll({h}, 1, -1)"),
    "flip": Stage("{o} = {h}.flip(-1)"),
    "pad": Stage("{o} = F.pad({h}, (1, 0))[..., :-1]"),
    "expand": Stage("{o} = (0.5 * {h}.unsqueeze(0).expand(2, *{h}.shape)).mean(0)"),
    "reshape": Stage("{o} = torch.tanh({h}.reshape({h}.shape[0], -1)).reshape({h}.shape)"),
    "flatten_view": Stage("{t} = {h}.contiguous().view({h}.size(0), -1)\n{o} = ({t} * 0.8).view_as({h})"),
    "transpose": Stage("{o} = ({h}.transpose(-1, -2) * 0.9).transpose(-1, -2)"),
    "permuted": Stage("{o} = (0.5 * {h}.movedim(-1, 0).contiguous()).movedim(0, -1)"),
    "index": Stage("{o} = {h}[..., list(range({h}.shape[-1]))[::-1]]"),
    "index_select": Stage("{o} = {h}.index_select(-1, torch.arange({h}.shape[-1] - 1, -1, -1))"),
    "gather": Stage("{o} = 0.5 * {h}.gather(-1, {h}.argsort(-1))"),
    # layers on the last dimension
    "linear": Stage("{o} = {p0}({h})", ("nn.Linear(8, 8)",), _LAST),
    "linear_tanh": Stage("{o} = torch.tanh({p0}({h}) + {x})", ("nn.Linear(8, 8)",), _LAST),
    "mlp": Stage("{o} = {p1}(F.relu({p0}({h})))", ("nn.Linear(8, 16)", "nn.Linear(16, 8)"), _LAST),
    "mlp_": Stage("{o} = {p0}({h})", ("nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8))",), _LAST),
    "matmul": Stage("{o} = {h} @ {p0}", ("matrix",), _LAST),
    "einsum": Stage("{o} = torch.einsum('...d,de->...e', {h}, {p0})", ("matrix",), _LAST),
    "layer_norm": Stage("{o} = 0.5 * {p0}({h})", ("nn.LayerNorm(8)",), _LAST),
    "f_layer_norm": Stage("{o} = 0.3 * F.layer_norm({h} + {x}, {h}.shape[-1:])"),
    "low_rank": Stage("{o} = {h} + {p1}({p0}({h}))", ("nn.Linear(8, 2)", "nn.Linear(2, 8)"), _LAST),
    "gru": Stage("{o} = {p0}({x}, {h})", ("nn.GRUCell(8, 8)",), ("vec", "graph")),
    "group_norm_vec": Stage("{o} = 0.5 * {p0}({h})", ("nn.GroupNorm(2, 8)",), ("vec",)),
    "bmm_vec": Stage("{o} = torch.bmm({h}.unsqueeze(1), {p0}.expand({h}.shape[0], 8, 8)).squeeze(1)", ("matrix",), ("vec",)),
    "conv1d_vec": Stage("{o} = {p0}({h}.unsqueeze(1)).squeeze(1)", ("nn.Conv1d(1, 1, 3, padding=1)",), ("vec",)),
    # sequences
    "gru_rows": Stage(
        "{o} = {p0}({x}.reshape(-1, 8), {h}.reshape(-1, 8)).view({h}.shape)", ("nn.GRUCell(8, 8)",), ("seq",)
    ),
    "sdpa": Stage("{o} = F.scaled_dot_product_attention({h}, {x}, {h})", (), ("seq",)),
    "heads": Stage(
        "{t}, {s}, {o} = (a.unflatten(-1, (2, 4)).transpose(1, 2) for a in {p0}({h} + {x}).chunk(3, -1))\n"
        "{o} = F.scaled_dot_product_attention({t}, {s}, {o}, is_causal=True).transpose(1, 2).flatten(2)",
        ("nn.Linear(8, 24)",),
        ("seq",),
    ),
    "attention": Stage(
        "{t} = torch.matmul({h}, {x}.transpose(1, 2)) * 0.3\n{o} = torch.bmm(torch.softmax({t}, -1), {h})", (), ("seq",)
    ),
    "masked_attention": Stage(
        "{s} = torch.ones({h}.shape[1], {h}.shape[1], dtype=torch.bool).tril()\n"
        "{t} = torch.einsum('btd,bsd->bts', {h}, {h}).masked_fill(~{s}, float('-inf'))\n"
        "{o} = torch.einsum('bts,bsd->btd', {t}.softmax(-1), {x})",
        (),
        ("seq",),
    ),
    "conv1d": Stage(
        "{o} = {p0}({h}.transpose(1, 2)).transpose(1, 2)", ("nn.Conv1d(8, 8, 3, padding=1, groups=2)",), ("seq",)
    ),
    # images
    "conv": Stage("{o} = {p0}({h})", ("nn.Conv2d(4, 4, 3, padding=1)",), ("img",)),
    "conv_grouped": Stage("{o} = {p0}({h})", ("nn.Conv2d(4, 4, 3, padding=1, groups=2)",), ("img",)),
    "conv_depthwise": Stage("{o} = {p0}({h}) + {x}", ("nn.Conv2d(4, 4, 3, padding=1, groups=4)",), ("img",)),
    "conv_transposed": Stage("{o} = {p0}({h})", ("nn.ConvTranspose2d(4, 4, 3, padding=1)",), ("img",)),
    "down_up": Stage(
        "{o} = {p1}(F.relu({p0}({h})))",
        ("nn.Conv2d(4, 8, 3, stride=2, padding=1)", "nn.ConvTranspose2d(8, 4, 2, stride=2)"),
        ("img",),
    ),
    "block": Stage(
        "{o} = {p1}(F.relu({p0}({h}), inplace=True))\n{o} += {x}\n{o} = 0.3 * F.relu({o})",
        ("nn.Conv2d(4, 4, 3, padding=1)", "nn.GroupNorm(2, 4)"),
        ("img",),
    ),
    "group_norm": Stage("{o} = 0.5 * {p0}({h})", ("nn.GroupNorm(2, 4)",), ("img",)),
    "pool": Stage("{o} = F.interpolate(F.avg_pool2d({h}, 2), scale_factor=2.0)", (), ("img",)),
    "max_pool": Stage("{o} = 0.5 * F.max_pool2d({h}, 3, 1, 1)", (), ("img",)),
    "shuffle": Stage("{o} = {h}.view(-1, 2, 2, 4, 4).transpose(1, 2).reshape({h}.shape)", (), ("img",)),
    "nhwc": Stage("{o} = {p0}({h}.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)", ("nn.Linear(4, 4)",), ("img",)),
    # graphs
    "adjacency": Stage("{o} = {p0} @ {h}", ("adjacency",), ("graph",)),
    "propagate": Stage(
        "{o} = torch.einsum('ij,jd->id', {p0}, torch.tanh({p1}({h})))", ("adjacency", "nn.Linear(8, 8)"), ("graph",)
    ),
    "index_add": Stage(
        "{t} = torch.arange(5)\n{o} = torch.zeros_like({h}).index_add(0, (2 * {t}) % 5, 0.5 * {h}[({t} + 1) % 5])", (), ("graph",)
    ),
    "scatter_": Stage(
        "{t} = torch.arange(5).flip(0)\n{o} = torch.zeros_like({h})\n{o}.index_add_(0, {t}, 0.5 * {h})", (), ("graph",)
    ),
}  # fmt: skip


def usable(domain: str) -> list[str]:
    """Names of the stages of one domain, simple ones first."""
    return [name for name, stage in STAGES.items() if domain in stage.domains]
