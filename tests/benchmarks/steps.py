"""Training steps, ours and the opponents'."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count, cycle
from typing import Any

import torch
from torch import nn
from torch._inductor.utils import fresh_cache

from models import create_model
from models.precision import autocast, precision
from models.registry import BACKBONES
from tests.benchmarks.inputs import CPU, DEVICE, Inputs, batches_of, folder_of, noise_images
from tests.benchmarks.measure import Case, Work
from tests.benchmarks.peers import IMAGE, network_of
from tests.benchmarks.published import CLASSES, endless, published_mae_step, published_step
from training.augment import with_crops
from training.data import TrainingData
from training.ema import EMA
from training.objectives import FlowMatching, MaskedAutoencoding


@dataclass(frozen=True)
class Scale:
    """How large a step is.

    Attributes:
        size: of the network, a name of `models.registry`.
        patch_size: edge in pixels.
        batch_size: images.
    """

    size: str
    patch_size: int
    batch_size: int

    def sizes(self, backbone: str) -> dict[str, Any]:
        """Of the network, as it is asked for."""
        patch = {} if backbone == "unet" else {"patch_size": self.patch_size}
        return {**BACKBONES[backbone].sizes[self.size], **patch}

    def create(self, backbone: str, **options: Any) -> nn.Module:
        """The network for images of 32 px."""
        classes = {} if BACKBONES[backbone].task == "mae" else {"num_classes": CLASSES}
        return create_model(backbone, self.size, image_size=IMAGE, **{**self.sizes(backbone), **classes, **options})

    def about(self, name: str) -> str:
        return f"{name}-{self.size}, {IMAGE} px, patch {self.patch_size}"


SMALL = Scale("XS", 4, 32)
HERE = SMALL if DEVICE == CPU else Scale("S", 2, 256)
LARGE = Scale("XL", 2, 64)  # with the tokens of latents of 256 px


def step_of(backbone: str, alpha_min: float, **options: Any) -> tuple[nn.Module, Work]:
    """A network, and a training step of it on images that are there, in the precision that pays here."""
    torch.manual_seed(0)
    model = HERE.create(backbone, alpha_min=alpha_min, **options).to(DEVICE)
    objective = MaskedAutoencoding(model.num_patches) if backbone == "mae" else FlowMatching(CLASSES)
    return model, step_with(model, model, objective)


def step_with(model: nn.Module, network: Callable[..., torch.Tensor], objective: Callable) -> Work:
    """Forward, backward and AdamW; `network` calls the model as ours are called."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    images, labels = some_batch(HERE.batch_size)
    batch, generator = {"images": images, "labels": labels}, torch.Generator(DEVICE).manual_seed(0)

    def step() -> None:
        with autocast(DEVICE, precision("auto")):
            loss = objective(network, batch, generator)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def some_batch(batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images in [-1, 1] and labels, where the steps are computed."""
    images = torch.rand(batch_size, 3, IMAGE, IMAGE, device=DEVICE) * 2 - 1
    return images, torch.randint(CLASSES, (batch_size,), device=DEVICE)


def whole_step(
    model: nn.Module, data: TrainingData, objective: Callable, max_grad_norm: float, ema_decay: float, batch_size: int = HERE.batch_size
) -> Work:
    """Everything that our loop does in a step: the next images of packed bytes, flips, the step itself, clipping, averages."""
    device = next(model.parameters()).device
    optimizer, ema = torch.optim.AdamW(model.parameters(), fused=True), EMA(model.parameters(), ema_decay)
    next_batch, steps = batches_of(data, batch_size, device), count(1)

    def step() -> None:
        batch, generator = next_batch()
        with autocast(device, precision("auto")):
            loss = objective(model, batch, generator)
        loss.backward()
        if max_grad_norm:
            nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        ema.update(model.parameters(), next(steps))

    return step


def compiled(case: Case, model: nn.Module) -> Case:
    """The same with our network compiled; how long that took stands apart."""
    model.compile(dynamic=False)
    began = time.perf_counter()
    with fresh_cache():  # what an earlier run compiled would be taken
        case.ours()
    notes = (f"the first step, which compiles, took {time.perf_counter() - began:.0f} s",)
    return replace(case, about=f"{case.about}, ours compiled", notes=notes)


def size_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def loop(compile: bool, inputs: Inputs) -> Case:
    """A step of our whole loop against the published one: DiT without long skips, 32 px."""
    return _loop("dit", "DiT", inputs, compile, long_skips=False)


def uvit_loop(inputs: Inputs) -> Case:
    """The same of a U-ViT, against a checkout of it."""
    if inputs.peer is None:
        raise ValueError("uvit-loop needs a checkout of baofff/U-ViT; give it with --peer")
    return _loop("uvit", "U-ViT", inputs, compile=False)


def _loop(backbone: str, title: str, inputs: Inputs, compile: bool, **options: Any) -> Case:
    """Whole steps of a diffusion model at an alpha_min of 0.5."""
    from torchvision.transforms import CenterCrop

    torch.manual_seed(0)
    data, model = noise_images(18 * HERE.batch_size, IMAGE), HERE.create(backbone, alpha_min=0.5, **options).to(DEVICE)
    ours = whole_step(model, data, FlowMatching(CLASSES), max_grad_norm=1.0, ema_decay=0.9999)
    network = network_of(inputs.peer, backbone, HERE.sizes(backbone)).to(DEVICE)
    theirs = published_step(network, endless(inputs.keep(folder_of(data)), HERE.batch_size, CenterCrop(IMAGE)))
    return _whole(HERE.about(title), inputs, ours, theirs, model, compile)


def mae_loop(compile: bool, inputs: Inputs) -> Case:
    """The same of a masked autoencoder, with random-resized crops."""
    from torchvision.transforms import InterpolationMode, RandomResizedCrop

    torch.manual_seed(0)
    data, model = noise_images(18 * HERE.batch_size, IMAGE), HERE.create("mae", long_skips=False).to(DEVICE)
    ours = whole_step(model, with_crops(data, 0.2), MaskedAutoencoding(model.num_patches), max_grad_norm=0.0, ema_decay=0.0)
    crop = RandomResizedCrop(IMAGE, (0.2, 1.0), interpolation=InterpolationMode.BICUBIC)
    network = network_of(inputs.peer, "mae", HERE.sizes("mae")).to(DEVICE)
    theirs = published_mae_step(network, endless(inputs.keep(folder_of(data)), HERE.batch_size, crop))
    return _whole(HERE.about("MAE"), inputs, ours, theirs, model, compile)


def _whole(network: str, inputs: Inputs, ours: Work, theirs: Work, model: nn.Module, compile: bool) -> Case:
    about, goal = f"{network}: whole step / {inputs.theirs}", 3 if DEVICE == CPU else 6
    parameters, peer = size_of(model), inputs.peer_name
    case = Case(about, ours, theirs, peer=peer, goal=goal, parameters=parameters, pairs=20, warm_ups=3, of_torch=False)
    return compiled(case, model) if compile else case


def tuned(scale: Scale, _: Inputs) -> Case:
    """A compiled step of our loop against the published network as it is tuned today: bf16, torch's attention, compiled, images at hand."""
    torch.manual_seed(0)
    model = scale.create("dit", alpha_min=0.5, long_skips=False).to(DEVICE)
    ours = whole_step(model, noise_images(18 * scale.batch_size, IMAGE), FlowMatching(CLASSES), 1.0, 0.9999, scale.batch_size)
    network = network_of(None, "dit", scale.sizes("dit")).to(DEVICE)
    theirs = published_step(network, cycle([some_batch(scale.batch_size)]), precision("auto"))
    network.compile()
    about = f"{scale.about('DiT')}, {scale.batch_size} images: whole step / the published one in bf16, compiled, without feeding"
    return compiled(Case(about, ours, theirs, goal=1.3, parameters=size_of(model), pairs=20, warm_ups=5, of_torch=False), model)


def diffusers(_: Inputs) -> Case:
    """Our training step against one of diffusers' DiT of the same size, both in the precision that pays here."""
    torch.manual_seed(0)
    model = diffusers_dit(in_channels=3, out_channels=3, num_embeds_ada_norm=CLASSES).to(DEVICE)
    network = lambda x, t, labels: model(x, timestep=1000 * t, class_labels=labels).sample  # noqa: E731
    steps = step_of("dit", 0.5, long_skips=False)[1], step_with(model, network, FlowMatching(CLASSES))
    return Case(f"DiT-{HERE.size}: our step / diffusers'", *steps, goal=1.3, parameters=size_of(model), pairs=20)


def diffusers_dit(**options: int) -> nn.Module:
    """Diffusers' DiT of the size of ours."""
    from diffusers import DiTTransformer2DModel

    ours = HERE.sizes("dit")
    heads = dict(num_attention_heads=ours["num_heads"], attention_head_dim=ours["dim"] // ours["num_heads"], num_layers=ours["depth"])
    return DiTTransformer2DModel(**heads, patch_size=ours["patch_size"], sample_size=IMAGE, **options)


def alpha(backbone: str, _: Inputs) -> Case:
    """What fading costs: a decayed training step against a plain one.

    Of one network whose alphas change from turn to turn: two would differ by where they lie in memory, by up to a per cent (`control`).
    A plain U-Net runs its library's own blocks, so there it takes two.
    """
    about, goal = f"{backbone}: decayed step / plain step", 1 / 1.005
    model, step = step_of(backbone, 0.5)
    if backbone == "unet":
        return Case(about, step, step_of(backbone, 1.0)[1], goal=goal)
    faded = model.alphas

    def with_alphas(alphas: Sequence[float]) -> Work:
        def run() -> None:
            for shortcut, value in zip(model.shortcuts, alphas, strict=True):
                shortcut.alpha = value
            step()

        return run

    return Case(f"{about}, of one network", with_alphas(faded), with_alphas([1.0] * len(faded)), goal=goal)


def control(_: Inputs) -> Case:
    """The same work on both sides: how far from 1 a ratio may lie by chance or by the order of allocation."""
    return Case("dit: plain step / plain step", step_of("dit", 1.0)[1], step_of("dit", 1.0)[1])
