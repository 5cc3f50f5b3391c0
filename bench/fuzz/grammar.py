"""Random programs: a `Recipe` of small choices, and the runnable source text it stands for.

A recipe is data, so that a failing one can be made smaller choice by choice (`shrink.py`), and every choice lists its
simplest value first, so that hypothesis shrinks towards that too.
"""

from __future__ import annotations

import dataclasses
import random
import re
import textwrap

from .forms import FORMS
from .forms_today import helpers
from .stages import NODES, SHAPES, STAGES, usable

INITIAL = {
    "zeros": "torch.zeros_like(x)",
    "input": "x",
    "new_zeros": "x.new_zeros(x.shape)",
    "product": "(0.5 * x)",
    "network": "torch.tanh(self.guess * x)",
    "learned": "self.guess.expand(x.shape)",
    "ones": "torch.ones(x.shape, dtype=x.dtype)",
}
INJECTION = {"input": "x", "before": "torch.tanh(self.h(x))", "view": "x.flip(0)[:]", "used_after": "torch.tanh(self.h(x))"}
ENDS = {
    "linear": "{gain} * {h} + {x}",
    "plain": "{gain} * {h}",
    "tanh": "torch.tanh({gain} * {h} + {x})",
    "relu_": "F.relu({gain} * {h} + {x}, inplace=True)",
    "residual": "{z} + 0.5 * ({gain} * {h} + 0.3 * {x} - {z})",
    # No fixed point: every step has the same length.
    "drift": "{z} + {gain} * F.normalize({h} + {x}, dim=-1)",
    # Two fixed points an element, and none between.
    "bistable": "torch.tanh(2.5 * {z} + 0.1 * {h} + 0.01 * {x})",
}
# What the inputs hold: always, or from the second call on.
_NAN = "x[0, ..., 1] = math.nan"
POISONS = {"none": "", "nan": _NAN, "inf": "x[-1, ..., 0] = math.inf", "nan_later": _NAN}
CALLS = ("same", "fresh")  # two calls with the same input, or four with one of their own
PLACES = ("method", "closure", "partial")
# Most contract, so that a solve may stand in; the others expand or oscillate and have to be kept.
GAINS = (0.3, 0.2, 0.2, 0.3, 0.4, 0.5, 0.6, 0.9, -0.4, -1.1, 1.5)
COUNTS = (40, 30, 60, 40, 30, 50, 12, 6, 5, 3)
OUTPUTS = ("plain", "head", "with_input", "in_place_after", "sum")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One program; see `source` for what the fields mean."""

    form: str
    domain: str = "vec"
    first: tuple[str, ...] = ()
    second: tuple[str, ...] = ()
    end: str = "linear"
    gain: float = 0.3
    count: int = 40
    batch: int = 3
    initial: str = "zeros"
    injection: str = "input"
    place: str = "method"
    output: str = "plain"
    dtype: str = "float64"
    training: bool = True
    poison: str = "none"
    calls: str = "same"
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.form}-{self.domain}-{self.seed}"


def random_recipe(rng: random.Random, form: str | None = None) -> Recipe:
    form = form or rng.choice(list(FORMS))
    domain = rng.choice(list(SHAPES))
    names = usable(domain)
    return Recipe(
        form=form,
        domain=domain,
        first=tuple(rng.choice(names) for _ in range(rng.choice((1, 2, 2, 3, 3, 4, 5)))),
        second=tuple(rng.choice(names) for _ in range(rng.choice((1, 2, 3)))),
        end=rng.choice(list(ENDS)),
        gain=rng.choice(GAINS),
        count=rng.choice(COUNTS),
        batch=rng.choice((3, 2, 1, 4)),
        initial=rng.choice(list(INITIAL)),
        injection=rng.choice(list(INJECTION)),
        place=rng.choice(PLACES),
        output=rng.choice(OUTPUTS),
        dtype=rng.choice(("float64",) * 7 + ("float32",)),
        training=rng.choice((True, True, True, False)),
        poison=rng.choice(("none",) * 9 + ("nan", "inf", "nan_later")),
        calls=rng.choice(("same",) * 4 + ("fresh",)),
        seed=rng.randrange(1000),
    )


class _Body:
    """Lines of one body, and the modules it registers."""

    def __init__(self, recipe: Recipe, stages: tuple[str, ...], prefix: str) -> None:
        self.registered: list[str] = []
        self.lines: list[str] = []
        fresh = iter(range(1000))
        h = "z"
        for name in stages:
            stage = STAGES[name]
            fields = {"h": h, "x": "x", "z": "z", "o": f"h{next(fresh)}", "t": f"t{next(fresh)}", "s": f"s{next(fresh)}"}
            for i, kind in enumerate(stage.params):
                attribute = f"{prefix}{len(self.registered)}"
                self.registered.append(f"self.{attribute} = {_registered(kind, recipe.domain)}")
                fields[f"p{i}"] = f"self.{attribute}"
            self.lines += stage.code.format(**fields).splitlines()
            h = fields["o"]
        self.lines.append("return " + ENDS[recipe.end].format(gain=recipe.gain, h=h, x="x", z="z"))


def _registered(kind: str, domain: str) -> str:
    last = SHAPES[domain][-1]
    return {
        "buffer": f"nn.Buffer(torch.rand({last}))",
        "parameter": f"nn.Parameter(torch.rand({last}))",
        "matrix": "nn.Parameter(torch.randn(8, 8))",
        "adjacency": f"nn.Buffer(torch.softmax(torch.randn({NODES}, {NODES}), -1))",
    }.get(kind, kind)


def source(recipe: Recipe) -> str:
    """The program as a runnable file with `Model` and `make_inputs()`."""
    shape = ((NODES,) if recipe.domain == "graph" else (recipe.batch,)) + SHAPES[recipe.domain]
    first, second = _Body(recipe, recipe.first, "a"), _Body(recipe, recipe.second, "b")
    loop = FORMS[recipe.form].strip()
    fields = {"z0": INITIAL[recipe.initial], "u": "u"}
    uses_u = "{u}" in loop
    lines = loop.format(**fields).splitlines()
    if not lines[-1].startswith("return"):
        lines.append("return z")
    before = [f"u = {INJECTION[recipe.injection]}"] if uses_u else []
    result = lines.pop().removeprefix("return ")
    after = _after(recipe, result, uses_u)
    forward = [*before, *lines, *after]
    registered = [
        *first.registered,
        *second.registered,
        f"self.guess = nn.Parameter(torch.rand({SHAPES[recipe.domain][-1]}))",
        f"self.h = {'nn.Conv2d(4, 4, 1)' if recipe.domain == 'img' else 'nn.Linear(8, 8)'}",
        f"self.many = nn.ParameterList([torch.rand({SHAPES[recipe.domain][-1]}) for _ in range(N)])",
        "self.count = nn.Buffer(torch.zeros(()))",
        f"self.mean, self.var = nn.Buffer(torch.zeros({shape[1]})), nn.Buffer(torch.ones({shape[1]}))",
    ]
    # What the program does not name is left out: fewer parameters to compare, and a shorter file to read.
    text = "\n".join([*first.lines, *second.lines, *forward])
    registered = [r for r in registered if any(_names(r, text))]
    members = _members(recipe, first, second, "\n".join(forward))
    imports = [
        line
        for line, word in (
            ("import functools", "functools."),
            ("from dataclasses import dataclass", "State("),
            ("from torch.utils.checkpoint import checkpoint", "checkpoint("),
        )
        if word in text or word in members
    ]
    if recipe.poison != "none" or "math." in helpers(text):
        imports.append("import math")
    body = "\n".join(registered + ["contract(self)"])
    state = "\n\n@dataclass\nclass State:\n    z: torch.Tensor\n    w: torch.Tensor\n" if "State(" in text else ""
    state += (_ITERATE if "iterate(" in text else "") + helpers(text)
    return _FILE.format(
        recipe=recipe,
        imports="\n".join(sorted(imports, key=lambda line: line.startswith("from"))) + "\n" if imports else "",
        count=recipe.count,
        state=state,
        registered=textwrap.indent(body, " " * 8),
        members=textwrap.indent(members, " " * 4),
        training="" if recipe.training else "        self.eval()\n",
        forward=textwrap.indent("\n".join(forward), " " * 8),
        shape=shape,
        dtype=recipe.dtype,
        seed=recipe.seed,
        poison=_poison(recipe),
        calls=range(2) if recipe.calls == "same" else range(4),
        fresh=" + call" if recipe.calls == "fresh" else "",
    )


def _poison(recipe: Recipe) -> str:
    if recipe.poison == "none":
        return ""
    when = "    if call > 0:\n        " if recipe.poison == "nan_later" else "    "
    return f"{when}{POISONS[recipe.poison]}\n"


_ITERATE = """

def iterate(f, z, max_iter, tol):
    for _ in range(max_iter):
        new = f(z)
        if (new - z).norm() < tol * new.norm():
            return new
        z = new
    raise ArithmeticError("whose own solver fails has no result to compare with")
"""


def _names(line: str, text: str) -> list[str]:
    found = [part.strip().removeprefix("self.") for part in line.split(" = ", 1)[0].split(",")]
    return [name for name in found if re.search(rf"self\.{name}\b", text)]


def _members(recipe: Recipe, first: _Body, second: _Body, forward: str) -> str:
    """How the bodies hang on the model: methods, or callables that the model's attributes hold."""
    parts = []
    for name, body in (("f", first), ("g", second)):
        if not re.search(rf"self\.{name}\b", forward):
            continue
        text = "\n".join(body.lines)
        if recipe.place == "method":
            parts.append(f"def {name}(self, z, x):\n{textwrap.indent(text, '    ')}\n")
        elif recipe.place == "partial":
            parts.append(f"def body_{name}(self, x, z, gain):\n{textwrap.indent(text, '    ')}\n")
            parts.append(f"@property\ndef {name}(self):\n    return functools.partial(self.swapped_{name}, gain=1.0)\n")
            parts.append(f"def swapped_{name}(self, z, x, gain):\n    return self.body_{name}(x, z, gain)\n")
        else:
            kind = f"def body(z, x):\n{textwrap.indent(text, '    ')}\nreturn body"
            parts.append(f"@property\ndef {name}(self):\n{textwrap.indent(kind, '    ')}\n")
    return "\n".join(parts)


def _after(recipe: Recipe, result: str, uses_u: bool) -> list[str]:
    """What happens to the result, whose first part is a tensor shaped like the state."""
    if recipe.output == "plain":
        tail = ["return out"]
    elif recipe.output == "head":
        tail = ["return torch.tanh(out[0] if isinstance(out, tuple) else out), out"]
    elif recipe.output == "with_input":
        tail = ["return out, x * 2"]
    elif recipe.output == "in_place_after":
        tail = ["y = (out[0] if isinstance(out, tuple) else out) * 1.0", "y += 1.0", "return y, out"]
    else:
        tail = ["return (out[0] if isinstance(out, tuple) else out).sum(), out"]
    if recipe.injection == "used_after" and uses_u:
        tail[-1] += ", u"
    return [f"out = {result}", *tail]


_FILE = '''"""{recipe!r}"""
{imports}
import torch
import torch.nn.functional as F
from torch import nn

N = {count}
{state}

def contract(module):
    """Every weight matrix gets a spectral norm of 0.7."""
    with torch.no_grad():
        for p in module.parameters():
            if p.dim() > 1:
                p.mul_(0.7 / torch.linalg.matrix_norm(p.flatten(1), 2))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
{registered}
{training}
{members}
    def forward(self, x):
{forward}


CALLS = {calls}


def make_inputs(call=0):
    generator = torch.Generator().manual_seed({seed}{fresh})
    x = torch.randn({shape}, generator=generator, dtype=torch.float64).to(torch.{dtype})
{poison}    return (x,)


if __name__ == "__main__":
    from bench.fuzz.oracle import main

    raise SystemExit(main(__file__))
'''
