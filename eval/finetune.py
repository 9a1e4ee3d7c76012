"""Fine-tuning: how well a network classifies when it may change (arXiv 2111.06377 appendix A, but for mixup, cutmix and drop path)."""

import copy
import math
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.encoders import TEST_SEEDS, DiffusionEncoder, Encoder, block_shapes
from models.precision import autocast, precision
from models.progress import progress_bar
from training.augment import with_crops
from training.data import ImageData, Order

LAYER_DECAY, WEIGHT_DECAY, LABEL_SMOOTHING, CROP_MIN_SCALE, WARM_UP = 0.75, 0.05, 0.1, 0.35, 0.1


def require_pixels(encoder: Encoder) -> None:
    """Raise ValueError for a network that looks at latents, which are encoded once and cannot be cropped."""
    if isinstance(encoder, DiffusionEncoder) and encoder.pipeline.vae is not None:
        raise ValueError("--finetune crops pixels, and this network looks at latents; leave it away")


def finetune(
    encoder: Encoder,
    train: ImageData,
    test: ImageData,
    time: float | None,
    block: int,
    epochs: int,
    learning_rate: float = 1e-3,
    batch_size: int = 64,
    mixed_precision: str = "no",
    seed: int = 0,
) -> Tensor:
    """Train a copy of the network, and a linear layer on the mean of a block's normalised tokens, end to end.

    AdamW with a learning rate that falls by `LAYER_DECAY` from block to block towards the input, warm-up and cosine; random-resized
    crops and flips. Nothing is chosen, so nothing is held out.

    Args:
        encoder: stays as it is.
        time: at which a diffusion model looks, with new noise in each step; None for clean images.
        block: whose tokens are read; blocks after it take no part.
        epochs: over the training images.
        learning_rate: of the block that is read and the linear layer, for 256 images a step; batch_size / 256 times that is used.

    Returns:
        Labels (M,) of the test images.

    Raises:
        ValueError: a network that looks at latents, which are encoded once and cannot be cropped.
    """
    require_pixels(encoder)
    device, labels = encoder.device, torch.from_numpy(train.labels)
    classes, y = labels.unique(return_inverse=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        shapes = block_shapes(encoder, test)
        dim = shapes[block][1]
        head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, len(classes))).to(device)
    encoder = copy.deepcopy(encoder)
    encoder.network.requires_grad_(True)
    rate = learning_rate * batch_size / 256
    groups = [*layer_groups(encoder.network, rate, unused=len(shapes) - 1 - block), *_by_decay(head.named_parameters(), rate)]
    optimizer = torch.optim.AdamW(groups)
    steps = max(1, epochs * len(train) // batch_size)
    warm_up = max(1, round(WARM_UP * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * max(0, step - warm_up) / max(1, steps - warm_up)))
    )

    def outputs(inputs: Tensor, noise_seed: int) -> Tensor:
        with autocast(device, precision(mixed_precision)):
            ((_, tokens),) = encoder.blocks(inputs, noise_seed, (time,))
            return head(tokens[block].mean(1)).float()  # (N, C)

    draws = torch.Generator(device).manual_seed(seed)
    cropped, order = with_crops(train, CROP_MIN_SCALE), Order(len(train), seed)
    encoder.network.train()
    for step in progress_bar(range(steps), "fine-tuning", unit=" steps"):
        indices = order.indices(step * batch_size, batch_size)
        images = cropped.batch(train.rows(indices), device, draws, flip=True)["images"]
        loss = F.cross_entropy(outputs(images, seed + step * batch_size), y[indices].to(device), label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    encoder.network.eval()
    with torch.no_grad():
        read, starts = encoder.reader(test), range(0, len(test), batch_size)
        batches = ((start, np.arange(start, min(start + batch_size, len(test)))) for start in starts)
        found = torch.cat([outputs(read(rows), seed + TEST_SEEDS + start).argmax(1) for start, rows in batches])
    return classes[found.cpu()]


def layer_groups(network: nn.Module, rate: float, unused: int = 0) -> list[dict[str, Any]]:
    """Parameters by the block that they are in, for AdamW: what comes before the blocks learns slowest.

    Networks without blocks, or with blocks in several stages, learn alike.

    Args:
        rate: of the last block that takes part.
        unused: how many blocks at the end take no part.
    """
    layers: dict[int, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in network.named_parameters():
        block, last = re.match(r"blocks\.(\d+)\.(?!\d)", name), re.match(r"(?:fc_)?norm\.", name)
        layers.setdefault(int(block[1]) + 1 if block else 10**6 if last else 0, []).append((name, parameter))
    depth = max((layer for layer in layers if layer < 10**6), default=0) - unused
    return [group for layer, named in layers.items() for group in _by_decay(iter(named), rate * LAYER_DECAY ** max(0, depth - layer))]


def _by_decay(named: Iterator[tuple[str, nn.Parameter]], rate: float) -> list[dict[str, Any]]:
    """Those with weight decay, and those without: biases, norms, alphas, class tokens and positions, as MAE has it."""
    groups: dict[float, list[nn.Parameter]] = {WEIGHT_DECAY: [], 0.0: []}
    for name, parameter in named:
        free = parameter.ndim <= 1 or name.endswith(("cls_token", "pos_embed", "positions"))
        groups[0.0 if free else WEIGHT_DECAY].append(parameter)
    return [{"params": parameters, "lr": rate, "weight_decay": decay} for decay, parameters in groups.items() if parameters]
