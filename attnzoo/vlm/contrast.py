"""Contrastive decoding: the model's logits against those of a second, spoiled view of the same prompt."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnzoo.errors import check_range, check_same, check_tensor


def contrastive_logits(logits: Tensor, other: Tensor, alpha: float = 1.0, beta: float = 0.1) -> Tensor:
    """(1 + alpha) logits - alpha other, and -inf where logits < log(beta) + their maximum (VCD's vcd_sample.py).

    logits, other: [..., V], raw or log-probabilities. beta: how plausible a token must be, as a share of the most
    plausible one's probability; 0 keeps all.
    """
    check_same("shape", logits=logits, other=other)
    found = (1 + alpha) * logits - alpha * other
    if beta == 0:
        return found
    return found.masked_fill(logits < math.log(beta) + logits.max(-1, keepdim=True).values, -torch.inf)


def noisy_image(
    image: Tensor, noise_step: int = 500, noise: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """A picture after noise_step of 1000 steps of forward diffusion (VCD's vcd_add_noise.py): sigmoid schedule of betas
    from 1e-5 to 5e-3.

    image: floating point, any shape. noise: standard normal, of image's shape; None: drawn from generator.
    """
    check_tensor("image", image)
    check_range("noise_step", noise_step, 0, 999)
    steps = torch.linspace(-6, 6, 1000)
    betas = torch.sigmoid(steps) * (5e-3 - 1e-5) + 1e-5
    kept = torch.cumprod(1 - betas, 0)[noise_step]
    if noise is None:
        noise = torch.randn(image.shape, generator=generator, dtype=torch.float32).to(image)
    return kept.sqrt().to(image) * image + (1 - kept).sqrt().to(image) * noise.to(image)
