"""The training loops as they are published, written down once more: eager fp32 blocks, ImageFolder and DataLoader, an average per tensor.

After train.py and models.py of facebookresearch/DiT and willisma/SiT, and main_pretrain.py and models_mae.py of facebookresearch/mae: every
block has its own modulation, the images are decoded, cropped, flipped and normalised one by one in two workers, AdamW is torch's default,
and the averaged weights are moved tensor by tensor.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from models.layers import TimestepEmbedding, patchify, sincos_positions, unpatchify
from models.precision import autocast

CLASSES = 9
SAMPLER_STEPS = 250
PROBE_EPOCHS = 90


class PublishedBlock(nn.Module):
    """adaLN-Zero with a modulation of its own, attention and MLP of timm."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        from timm.layers import Attention, Mlp

        self.norm1 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(dim, num_heads=num_heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(dim, 4 * dim, act_layer=lambda: nn.GELU(approximate="tanh"), drop=0)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)
        x = x + gate1.unsqueeze(1) * self.attn(self.norm1(x) * (1 + scale1.unsqueeze(1)) + shift1.unsqueeze(1))
        x = x + gate2.unsqueeze(1) * self.mlp(self.norm2(x) * (1 + scale2.unsqueeze(1)) + shift2.unsqueeze(1))
        return x


class PublishedDiT(nn.Module):
    """DiT without long skips."""

    def __init__(self, image_size: int, patch_size: int, depth: int, dim: int, num_heads: int) -> None:
        super().__init__()
        self.patch_size, grid = patch_size, image_size // patch_size
        self.patch_embed = nn.Linear(3 * patch_size**2, dim)
        self.positions = nn.Parameter(sincos_positions(dim, grid, grid), requires_grad=False)
        self.time_embed, self.label_embed = TimestepEmbedding(dim), nn.Embedding(CLASSES + 1, dim)
        self.blocks = nn.ModuleList(PublishedBlock(dim, num_heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))
        self.head = nn.Linear(dim, 3 * patch_size**2)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        c = self.time_embed(t) + self.label_embed(labels)
        x = self.patch_embed(patchify(x, self.patch_size)) + self.positions
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.modulation(c).chunk(2, dim=1)
        return unpatchify(self.head(self.norm(x) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)), self.patch_size, height, width)


def write_folder(folder: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """uint8 (N, H, W, 3) and their classes, as PNG files in a subfolder for each class."""
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        (folder / str(label)).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / str(label) / f"{i:05}.png")


def image_loader(folder: Path, batch_size: int, *augment: Callable) -> DataLoader:
    """Images of a folder from two workers, augmented one by one, in [-1, 1]."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    normalise = transforms.Normalize([0.5] * 3, [0.5] * 3)
    steps = transforms.Compose([*augment, transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalise])
    data = ImageFolder(str(folder), transform=steps)
    return DataLoader(data, batch_size, shuffle=True, num_workers=2, drop_last=True, persistent_workers=True)


def endless(*loader: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of `image_loader`, epoch after epoch."""
    batches = image_loader(*loader)
    while True:
        yield from batches


def published_step(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]], precision: str = "no") -> Callable[[], None]:
    """A step of SiT's loop: the next batch, forward, backward, AdamW, average.

    Args:
        model: of (x, t, labels); where it predicts twice the channels the second half is left alone.
        precision: "no" as they train, fp32, or "bf16" by autocast.
    """
    device = next(model.parameters()).device
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)

    def step() -> None:
        x, labels = (part.to(device) for part in next(batches))
        labels = torch.where(torch.rand(len(labels), device=device) < 0.1, CLASSES, labels)
        t, noise = torch.rand(len(x), device=device), torch.randn_like(x)
        along = t.view(-1, 1, 1, 1)
        with autocast(device, precision):
            predicted = model(along * x + (1 - along) * noise, t, labels)[:, :3]
        loss = (predicted.float() - (x - noise)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for kept, parameter in zip(average.parameters(), model.parameters(), strict=True):
                kept.mul_(0.9999).add_(parameter, alpha=1 - 0.9999)

    return step


@torch.no_grad()
def published_sampler(
    model: nn.Module, noise: Tensor, labels: Tensor, guidance: float, num_classes: int, steps: int = SAMPLER_STEPS
) -> Tensor:
    """Euler's `SAMPLER_STEPS` steps from noise to data, guided in each: both passes in one doubled batch, as in DiT's `forward_with_cfg`.

    Args:
        steps: leave after so many.
    """
    x, both = torch.cat([noise, noise]), torch.cat([labels, torch.full_like(labels, num_classes)])
    for i in range(steps):
        half = x[: len(noise)]
        strong, weak = model(torch.cat([half, half]), torch.full((len(x),), i / SAMPLER_STEPS, device=x.device), both).chunk(2)
        half = weak + guidance * (strong - weak)
        x = x + torch.cat([half, half]) / SAMPLER_STEPS
    return x[: len(noise)]


class PublishedMAE(nn.Module):
    """The masked autoencoder of blocks of timm; its loss is that of `models.MAE` without long skips."""

    def __init__(
        self, image_size: int, patch_size: int, depth: int, dim: int, num_heads: int,
        decoder_depth: int, decoder_dim: int, decoder_num_heads: int,
    ) -> None:  # fmt: skip
        super().__init__()
        from timm.models.vision_transformer import Block

        self.patch_size, grid = patch_size, image_size // patch_size
        self.patch_embed = nn.Linear(3 * patch_size**2, dim)
        self.cls_token, self.mask_token = nn.Parameter(torch.zeros(1, 1, dim)), nn.Parameter(torch.zeros(1, 1, decoder_dim))
        self.positions, self.decoder_positions = (
            nn.Parameter(torch.cat([torch.zeros(1, width), sincos_positions(width, grid, grid)]), requires_grad=False)
            for width in (dim, decoder_dim)
        )
        norm = partial(nn.LayerNorm, eps=1e-6)
        self.blocks = nn.Sequential(*(Block(dim, num_heads, qkv_bias=True, norm_layer=norm) for _ in range(depth)))
        self.norm, self.decoder_norm = norm(dim), norm(decoder_dim)
        self.decoder_embed = nn.Linear(dim, decoder_dim)
        decoder_blocks = (Block(decoder_dim, decoder_num_heads, qkv_bias=True, norm_layer=norm) for _ in range(decoder_depth))
        self.decoder_blocks = nn.Sequential(*decoder_blocks)
        self.head = nn.Linear(decoder_dim, 3 * patch_size**2)

    def forward(self, images: Tensor, mask_ratio: float = 0.75) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, prediction (N, T, p * p * C), and mask (N, T), 1 where hidden."""
        pixels = patchify(images, self.patch_size)
        n, t, _ = pixels.shape
        x = self.patch_embed(pixels) + self.positions[1:]
        order = torch.rand(n, t, device=x.device).argsort(1)
        back, kept = order.argsort(1), order[:, : round(t * (1 - mask_ratio))]
        x = x.gather(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        mask = torch.ones(n, t, device=x.device).scatter(1, kept, 0.0)
        x = torch.cat([(self.cls_token + self.positions[:1]).expand(n, -1, -1), x], dim=1)
        x = self.decoder_embed(self.norm(self.blocks(x)))
        tokens = torch.cat([x[:, 1:], self.mask_token.expand(n, t + 1 - x.shape[1], -1)], dim=1)
        tokens = tokens.gather(1, back.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        x = torch.cat([x[:, :1], tokens], dim=1) + self.decoder_positions
        prediction = self.head(self.decoder_norm(self.decoder_blocks(x)))[:, 1:]
        target = (pixels - pixels.mean(-1, keepdim=True)) / (pixels.var(-1, keepdim=True) + 1e-6).sqrt()
        return ((prediction - target).square().mean(-1) * mask).sum() / mask.sum(), prediction, mask


def published_probe_epoch(encode: Callable[[Tensor], Tensor], dim: int, loader: DataLoader) -> Callable[[], None]:
    """An epoch of MAE's linear probe: images through the frozen encoder, a batch norm without weights, a linear layer, SGD.

    Args:
        encode: images -> class tokens (N, dim).
    """
    head = nn.Sequential(nn.BatchNorm1d(dim, affine=False, eps=1e-6), nn.Linear(dim, CLASSES))
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)  # theirs is LARS, for batches of 16,384

    def epoch() -> None:
        for images, labels in loader:
            with torch.no_grad():
                x = encode(images)
            loss = nn.functional.cross_entropy(head(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return epoch


def published_mae_step(model: nn.Module, batches: Iterator[tuple[Tensor, Tensor]]) -> Callable[[], None]:
    """A step of MAE's loop: the next batch, forward, backward, AdamW.

    Args:
        model: of images; its first answer is the loss.
    """
    decayed = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95))
    device = next(model.parameters()).device

    def step() -> None:
        loss = model(next(batches)[0].to(device))[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step
