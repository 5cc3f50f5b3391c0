"""Vision: multiscale DEQs, optical flow, inverse problems, lens undistortion."""

from __future__ import annotations

import argparse
import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..manifest import Case, Model
from ..sources import absent
from .sequence import Called, deq_arguments, first, softly


def settings_of_mdeq(tight: bool) -> dict[str, Any]:
    """cls_mdeq_TINY.yaml with fewer channels and without dropout, as its script reads it."""
    stage = {"NUM_MODULES": 1, "NUM_BRANCHES": 2, "BLOCK": "BASIC", "BIG_KERNELS": [0, 0], "HEAD_CHANNELS": [8, 16]}
    stage |= {"FINAL_CHANSIZE": 32, "NUM_BLOCKS": [1, 1], "NUM_CHANNELS": [8, 8], "FUSE_METHOD": "SUM"}
    model = {"NUM_LAYERS": 10, "NUM_CLASSES": 10, "NUM_GROUPS": 4, "DROPOUT": 0.0, "WNORM": True, "DOWNSAMPLE_TIMES": 0}
    model |= {"EXPANSION_FACTOR": 2, "BLOCK_GN_AFFINE": True, "FUSE_GN_AFFINE": True, "POST_GN_AFFINE": True}
    steps = 300 if tight else 18
    deq = {"F_SOLVER": "broyden", "B_SOLVER": "broyden", "STOP_MODE": "rel", "F_THRES": steps, "B_THRES": steps + 2}
    return {"MODEL": model | {"EXTRA": {"FULL_STAGE": stage}}, "DEQ": deq, "TRAIN": {"PRETRAIN_STEPS": 0}}


def contracting(model: nn.Module) -> None:
    """Weights of a block that depends little on its state: an MDEQ contracts when it has been trained to, not as initialised."""
    with torch.no_grad():
        for name, module in model.named_modules():
            if name.endswith("gn1"):
                module.weight.mul_(0.1)
                module.bias.add_(1.0)
            if "post_fuse" in name and name.endswith("gnorm"):
                module.weight.mul_(0.1)


def multiscale(tight: bool) -> Case:
    """locuslab/deq, MDEQ-Vision: the classifier in training with its hook, without the loss on the Jacobian."""
    absent("termcolor")
    from lib import solvers
    from mdeq import MDEQClsNet

    model = MDEQClsNet(settings_of_mdeq(tight))
    if tight:
        model.f_solver = model.b_solver = functools.partial(solvers.broyden, eps=1e-11)
    contracting(model)
    return Case(Called(model, lambda net, x: net(x, compute_jac_loss=False)), (torch.randn(4, 3, 16, 16),), first)


def zoo_multiscale(tight: bool) -> Case:
    """locuslab/torchdeq, deq-zoo/mdeq: the same on TorchDEQ, implicit differentiation."""
    absent("termcolor")
    from models.mdeq import MDEQ

    settings = settings_of_mdeq(tight)
    model = MDEQ(
        settings, deq_arguments(tight, ift=True, norm_type="weight_norm", f_solver="broyden", b_solver="broyden", f_tol=1e-3)
    )
    contracting(model)
    return Case(model, (torch.randn(4, 3, 16, 16),), first)


def endpoint(predictions: list[Tensor], truth: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """A loss of the form that the flow networks are given: on the last prediction."""
    off = predictions[-1] - truth
    return (valid[:, None] * off.abs()).flatten(1).mean(1), off.detach().norm(dim=1)


def frames() -> tuple[Tensor, ...]:
    image = nn.functional.interpolate(torch.rand(1, 3, 16, 16), scale_factor=8.0, mode="bilinear") * 255
    return image, image.roll(2, 3), torch.randn(1, 2, 128, 128), torch.ones(1, 128, 128)


def answering(block: Any) -> None:
    """Weights that answer a flow with its opposite, as trained ones do around the right flow: as initialised it runs away."""
    gru, head = block.gru, block.flow_head
    softly(block, 0.5)
    with torch.no_grad():
        for step in (1, 2):
            q, z = getattr(gru, f"convq{step}"), getattr(gru, f"convz{step}")
            tap = (0, 2) if step == 1 else (2, 0)
            for axis in (0, 1):
                q.weight[axis] *= 0.1
                q.weight[axis, -2 + axis, tap[0], tap[1]] = -0.5  # the flow itself is the last two inputs
                z.bias[axis] = 4.0
        head.conv2.weight.mul_(0.1)
        for axis in (0, 1):
            for sign, row in ((1.0, 2 * axis), (-1.0, 2 * axis + 1)):
                head.conv1.weight[row] = 0.0
                head.conv1.weight[row, axis, 1, 1] = sign
                head.conv2.weight[axis, row, 1, 1] = sign


def flow(tight: bool) -> Case:
    """locuslab/deq-flow, version 2: the tiny network, Anderson and implicit differentiation, batch-norm frozen."""
    absent("termcolor", "matplotlib", "matplotlib.pyplot")
    from deq.arg_utils import add_deq_args
    from deq_flow import DEQFlow

    parser = argparse.ArgumentParser()
    add_deq_args(parser)
    arguments = parser.parse_args(["--ift", "--safe_ift", "--f_eps", "1e-4", "--f_stop_mode", "rel", "--b_stop_mode", "rel"])
    vars(arguments).update(tiny=True, large=False, huge=False, gigantic=False, gma=False, mixed_precision=False)
    vars(arguments).update(all_grad=True, old_version=False, dropout=0.0, vdropout=0.0)
    if tight:
        vars(arguments).update(f_eps=1e-6, b_eps=1e-6, f_thres=300, b_thres=300)
    model = DEQFlow(arguments)
    model.freeze_bn()
    answering(model.update_block)
    return Case(Called(model, lambda net, a, b, truth, valid: net(a, b, truth, valid, endpoint)), frames(), first)


def zoo_flow(tight: bool) -> Case:
    """locuslab/torchdeq, deq-zoo/deq-flow: the same on TorchDEQ."""
    absent("termcolor", "matplotlib", "matplotlib.pyplot")
    from core.deq_flow import DEQFlow

    arguments = deq_arguments(tight, ift=True, norm_type="none", f_solver="anderson", f_tol=1e-4, f_stop_mode="rel")
    if tight:
        vars(arguments).update(f_tol=1e-6, b_tol=1e-6, b_stop_mode="rel")
    vars(arguments).update(tiny=True, large=False, huge=False, gigantic=False, gma=False, mixed_precision=False)
    vars(arguments).update(all_grad=True, old_version=False, dropout=0.0, vdropout=0.0)
    model = DEQFlow(arguments)
    model.freeze_bn()
    answering(model.update_block)
    return Case(Called(model, lambda net, a, b, truth, valid: net(a, b, truth, valid, endpoint)), frames(), first)


def deblurring(solver: str, tight: bool) -> Case:
    """dgilton/deep_equilibrium_inverse: proximal gradient with its U-net, whose weights start small."""
    absent("cv2", "imageio", "PIL", "PIL.Image")
    from networks.equilibrium_u_net import UnetModel
    from operators.blurs import GaussianBlur
    from solvers import new_equilibrium_utils as utilities
    from solvers.equilibrium_solvers import EquilibriumProxGrad

    network = UnetModel(in_chans=3, out_chans=3, num_pool_layers=2, drop_prob=0.0, chans=8)
    blur = GaussianBlur(sigma=0.5, kernel_size=5, n_channels=3, n_spatial_dimensions=2)
    iterate = EquilibriumProxGrad(linear_operator=blur, nonlinear_operator=network, eta=0.9, minval=-1, maxval=1)
    options: dict[str, Any] = {"max_iter": 5000, "tol": 1e-11} if tight else {"max_iter": 100, "tol": 1e-5}
    if solver == "andersonexp":
        options |= {"m": 5, "beta": 1.0, "lam": 1e-2}
    model = utilities.DEQFixedPoint(iterate, getattr(utilities, solver), **options)
    return Case(model, (torch.randn(2, 3, 16, 16) * 0.3,))


def undistortion(tight: bool) -> Case:
    """kornia: lens undistortion of points, twenty iterations, with gradients to the distortion."""
    from kornia.geometry.calibration import undistort_points

    camera = torch.eye(3).repeat(4, 1, 1)
    camera[:, 0, 0] = camera[:, 1, 1] = 300.0
    camera[:, :2, 2] = 160.0
    dist = torch.tensor([0.05, -0.01, 0.001, -0.002, 0.002]).repeat(4, 1).requires_grad_()
    points = (torch.rand(4, 500, 2) * 320).requires_grad_()

    def undistort(points: Tensor, camera: Tensor, dist: Tensor) -> Tensor:
        return undistort_points(points, camera, dist, num_iters=20)

    return Case(undistort, (points, camera, dist))


def proximal_equilibrium(tight: bool) -> Case:
    """deepinv: proximal gradient as a DEQ with a trainable step and an L1 prior, on a blur."""
    from . import stand_ins

    stand_ins.torchvision()
    import deepinv as dinv

    physics = dinv.physics.BlurFFT((1, 32, 32), filter=dinv.physics.blur.gaussian_blur(sigma=(1.0, 1.0)), padding="circular")
    x = torch.rand(2, 1, 32, 32)
    model = dinv.optim.PGD(
        data_fidelity=dinv.optim.L2(),
        prior=dinv.optim.Tikhonov(),
        stepsize=1.0,
        lambda_reg=0.1,
        max_iter=2000 if tight else 50,
        early_stop=True,
        thres_conv=1e-11 if tight else 1e-5,
        DEQ=True,
        trainable_params=["stepsize", "lambda_reg"],
    )
    return Case(Called(model, lambda net, y: net(y, physics)), (physics(x),))


TORCHDEQ = ("locuslab/torchdeq", "4f6bd5fa66dd991cad74fcc847c88061764cf8db", "MIT")
FLOW = ("locuslab/deq-flow", "869d4bcd9c1d227cbfa16639994d1b118510a9bb", "AGPL-3.0")
INVERSE = ("dgilton/deep_equilibrium_inverse", "94a5ac58b2904d7d3cbd7f7320044fa303c56c65", "none stated")

MODELS: tuple[Model, ...] = (
    Model(
        "mdeq",
        "locuslab/deq",
        "1fb7059d6d89bb26d16da80ab9489dcc73fc5472",
        "MIT",
        "Broyden with traces, a hook that solves",
        multiscale,
        path=("MDEQ-Vision/lib/models", "MDEQ-Vision/lib", ""),
    ),
    Model("zoo-mdeq", *TORCHDEQ, "TorchDEQ, implicit", zoo_multiscale, path=("deq-zoo/mdeq/mdeq_cifar/mdeq", "")),
    Model("deq-flow", *FLOW, "Anderson with statistics, a hook that solves", flow, path=("code.v.2.0/core",), double=False),
    Model("zoo-deq-flow", *TORCHDEQ, "TorchDEQ, implicit, two states", zoo_flow, path=("deq-zoo/deq-flow", ""), double=False),
    Model("deblurring-anderson", *INVERSE, "Anderson, a hook that solves", lambda tight: deblurring("andersonexp", tight)),
    Model(
        "deblurring-picard", *INVERSE, "plain iteration with a list, a hook", lambda tight: deblurring("forward_iteration", tight)
    ),
    Model("undistortion", "kornia/kornia", "", "Apache-2.0", "20 steps", undistortion, package="kornia"),
    Model(
        "deepinv-pgd",
        "deepinv/deepinv",
        "",
        "BSD-3-Clause",
        "a class that iterates, a hook",
        proximal_equilibrium,
        package="deepinv",
    ),
)
