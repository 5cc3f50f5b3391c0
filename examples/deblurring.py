# %% [markdown]
# # Deblurring a photograph with a proximal network
#
# A blurred photograph y = A x + noise is restored by descending a data term and a learnt prior at once:
#
# z <- z - eta (A^T (A z - y) + tau (z - R(z))).
#
# R smooths the image and adds what a small convolutional network makes of it. The restored image is the fixed point of this map.
# R is trained through it, on patches of one photograph, and tried on another one. Both photographs come with scikit-learn.

# %%
from typing import Any

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from sklearn.datasets import load_sample_image
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from deq_compile import explain, record_solves

NOISE, ETA, TAU = 0.01, 1.5, 0.03


class Blur(nn.Module):
    """A Gaussian blur of 5 x 5 pixels, its own adjoint. [B, 1, H, W] -> the same"""

    kernel: Tensor

    def __init__(self, sigma: float = 1.0) -> None:
        super().__init__()
        line = torch.exp(-torch.arange(-2.0, 3.0).square() / (2 * sigma**2))
        self.register_buffer("kernel", (line[:, None] * line / line.sum() ** 2)[None, None])

    def forward(self, image: Tensor) -> Tensor:
        return F.conv2d(image, self.kernel, padding=2)


class ProximalNet(nn.Module):
    """The fixed point of the map above, as 100 iterations of it. y [B, 1, H, W] -> the restored image, the same shape"""

    def __init__(self, width: int = 16, iterations: int = 100) -> None:
        super().__init__()
        self.blur, self.iterations = Blur(), iterations
        self.first, self.last = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, 1, 3, padding=1, bias=False)
        for layer in (self.first, self.last):
            spectral_norm(layer)
        self.strength = nn.Parameter(torch.tensor(0.1))

    def forward(self, blurred: Tensor) -> Tensor:
        # A spectral norm moves a buffer whenever its weight is read in training, so both are read once, before the loop.
        first, last = self.first.weight, 0.5 * torch.tanh(self.strength) * self.last.weight
        image = blurred
        for _ in range(self.iterations):
            hidden = torch.tanh(F.conv2d(image, first, self.first.bias, padding=1))
            prior = image - self.blur(image) - F.conv2d(hidden, last, padding=1)
            image = image - ETA * (self.blur(self.blur(image) - blurred) + TAU * prior)
        return image


# %%
def photograph(name: str) -> Tensor:
    """A photograph in grey, [1, 1, H, W] in 0 to 1."""
    return torch.tensor(load_sample_image(name)).float().mean(2)[None, None] / 255


def patches(image: Tensor, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Sharp patches [count, 1, size, size] and blurred, noisy ones."""
    tops = torch.randint(image.shape[2] - size, (count,)).tolist()
    lefts = torch.randint(image.shape[3] - size, (count,)).tolist()
    sharp = torch.cat([image[:, :, top : top + size, left : left + size] for top, left in zip(tops, lefts, strict=True)])
    return sharp, spoil(sharp)


def spoil(sharp: Tensor) -> Tensor:
    return Blur().forward(sharp) + NOISE * torch.randn_like(sharp)


def psnr(image: Tensor, sharp: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, without a rim of 4 pixels, where the blur reaches beyond the image."""
    error = (image - sharp)[:, :, 4:-4, 4:-4]
    return -10 * error.square().mean().log10().item()


# %%
def main(steps: int = 40, batch: int = 4, size: int = 48, options: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train on one photograph, restore parts of another; decibels before and after, and what the solves needed."""
    torch.manual_seed(0)
    model = ProximalNet()
    fast = torch.compile(model, backend="deq", options=options)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    flower = photograph("flower.jpg")
    with record_solves() as solves:
        for _ in range(steps):
            sharp, blurred = patches(flower, batch, size)
            optimizer.zero_grad()
            F.mse_loss(fast(blurred), sharp).backward()
            optimizer.step()
    china = photograph("china.jpg")  # roofs of a pagoda
    sharp = torch.cat([china[:, :, top : top + size, 280 : 280 + size] for top in range(100, 100 + 40 * batch, 40)])
    blurred = spoil(sharp)
    model.eval()
    with torch.no_grad():
        restored, by_loop = fast(blurred), model(blurred)
    return {
        "images": {"sharp": sharp, "blurred": blurred, "restored": restored},
        "psnr": {"blurred": psnr(blurred, sharp), "restored": psnr(restored, sharp), "by the loop": psnr(by_loop, sharp)},
        "evaluations": sum(solve.iterations for solve in solves) / len(solves),
        "statuses": {solve.status for solve in solves},
        "report": explain(model, **{**(options or {}), "inner": "eager"})(blurred),
    }


# %%
found = main() if __name__ == "__main__" else None
if found:
    print(found["report"])
    print("PSNR in dB:", ", ".join(f"{name} {value:.2f}" for name, value in found["psnr"].items()))
    print(f"evaluations of a training step: {found['evaluations']:.1f} in place of 100")


# %%
def draw(found: dict[str, Any]) -> None:
    """A part of the photograph, blurred and restored."""
    _, panels = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
    for panel, (name, image) in zip(panels, found["images"].items(), strict=True):
        panel.imshow(image[0, 0].clamp(0, 1), cmap="gray", vmin=0, vmax=1)
        panel.set_title(name)
        panel.axis("off")


if found:
    draw(found)
    plt.show()
