"""Torch's own caches in a second process: a region that is found there has its body, or compiles it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.fresh import python

PROGRAM = """
import torch
import json, time, warnings
import torch._dynamo, torch._functorch.config, torch._inductor.config
from torch._dynamo.utils import counters
warnings.simplefilter("ignore")
torch._functorch.config.enable_autograd_cache = True
torch._inductor.config.compile_threads = 1
torch.set_num_threads(1)
from deq_compile import deq_compile

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(8, 8)
        torch.nn.init.orthogonal_(self.inner.weight, gain=0.5)
    def forward(self, x):
        z = torch.zeros_like(x)
        for _ in range(40):
            z = torch.tanh(self.inner(z) + x)
        return z

folder, which = ARGUMENTS
torch.manual_seed(0)
model, x = Model(), torch.randn(4, 8)
with torch.no_grad():
    wanted = model(x)
if which == "second":
    torch.compiler.load_cache_artifacts(open(folder + "/artifacts", "rb").read())
found, start = {}, time.process_time()
with torch.no_grad():
    compiled = torch.compile(model, backend="deq")
    for call in range(2):
        found[f"error {call}"] = float((compiled(x) - wanted).norm() / wanted.norm())
        found.setdefault("seconds", time.process_time() - start)
    found["aot_autograd"], found["inductor"] = dict(counters["aot_autograd"]), dict(counters["inductor"])
    torch._dynamo.reset()
    torch._dynamo.config.caching_precompile = True
    packed = torch.compile(model, backend="deq", options={"tol": 1e-5})
    for call in range(2):
        found[f"packed error {call}"] = float((packed(x) - wanted).norm() / wanted.norm())
found["package"] = dict(counters["dynamo_cache"])
if which == "first":
    open(folder + "/artifacts", "wb").write(torch.compiler.save_cache_artifacts()[0])
print(json.dumps(found))
"""


def run(folder: Path, which: str) -> tuple[dict[str, Any], str]:
    ran = python(PROGRAM.replace("ARGUMENTS", repr((str(folder), which))), "dynamo", DEQ_COMPILE_RAISE="1")
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1]), ran.stderr


def test_a_second_process_finds_regions_with_their_bodies(tmp_path: Path) -> None:
    """FX graph cache, AOTAutograd cache, `save_cache_artifacts` and precompiled packages, which leave regions out with a line.
    The caches are Inductor's, so it compiles here, in processes of their own: one model of two graphs."""
    first, said = run(tmp_path, "first")
    second, _ = run(tmp_path, "second")
    for found in (first, second):
        assert max(value for name, value in found.items() if "error" in name) < 1e-3
    assert second["aot_autograd"]["autograd_cache_hit"] == 1
    assert not second["inductor"].get("fxgraph_cache_miss", 0)
    assert "package bypass: a fixed-point region has its body in the process that compiled it" in said
    assert second["package"] == {"dynamo_cache_hit": 1}
