"""The training loop as it is published, written down once more: eager fp32 blocks, ImageFolder and DataLoader, an average per tensor.

After train.py and models.py of facebookresearch/DiT and willisma/SiT: every block has its own modulation, the images are decoded,
flipped and normalised one by one in two workers, AdamW is torch's default, and the averaged weights are moved tensor by tensor.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from models.compat import import_torchvision
from models.layers import TimestepEmbedding, patchify, sincos_positions, unpatchify

CLASSES = 9


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


def published_loop(folder: Path, batch_size: int, **sizes: int) -> Callable[[], None]:
    """A step of the loop: the next batch from the workers, forward, backward, AdamW, average."""
    import_torchvision()
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    steps = [transforms.CenterCrop(sizes["image_size"]), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    data = ImageFolder(str(folder), transform=transforms.Compose([*steps, transforms.Normalize([0.5] * 3, [0.5] * 3)]))
    loader = torch.utils.data.DataLoader(data, batch_size, shuffle=True, num_workers=2, drop_last=True)

    def endless() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from loader

    batches, model = endless(), PublishedDiT(**sizes)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)

    def step() -> None:
        x, labels = next(batches)
        labels = torch.where(torch.rand(len(labels)) < 0.1, CLASSES, labels)
        t, noise = torch.rand(len(x)), torch.randn_like(x)
        along = t.view(-1, 1, 1, 1)
        loss = (model(along * x + (1 - along) * noise, t, labels) - (x - noise)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            for kept, parameter in zip(average.parameters(), model.parameters(), strict=True):
                kept.mul_(0.9999).add_(parameter, alpha=1 - 0.9999)

    return step
