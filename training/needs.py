"""What a training takes on many devices: memory, traffic, time, and from where on the network decides.

    python -m training.needs
    python -m training.needs --size B --patch_size 4 --resolution 64 --channels 3 --devices 8,64

Operations and activations are counted on the network itself, on torch's meta device, which computes nothing; the rest is
arithmetic from the figures of the machine that the flags give.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from models.files import Parser, one_line_errors
from models.registry import LARGEST, create_model, in_words, names, sizes
from training.options import add_options, option, read_options

BYTES = {"weights": 4, "gradients": 4, "AdamW": 8, "averages": 4}  # a parameter, in float32
SAVED = ("weights", "AdamW", "averages")  # in a checkpoint
EXPORTED = ("weights", "averages")  # beside it, as model/ and ema/


@dataclass(frozen=True)
class Network:
    """Network."""

    backbone: str = option("dit", "architecture", choices=names("diffusion"))
    size: str = option("XL", "width and depth", choices=sizes("diffusion"))
    depth: int | None = option(None, "blocks of a transformer; the size's own unless given", least=1, most=LARGEST["depth"])
    patch_size: int | None = option(None, "edge of a patch; the size's own unless given", least=1)
    resolution: int = option(32, "edge of what the network sees: 32 for latents of 256 px images", least=1)
    channels: int = option(4, "3 for images, 4 for latents", least=1)
    num_classes: int = option(1000, "labels", least=0)


@dataclass(frozen=True)
class Machine:
    """Machine; the defaults are the data sheet of an H100 SXM, with one 400 Gbit/s port a device, and a utilisation to be hoped for."""

    batch_size: int = option(256, "images of a step, over all devices", least=1)
    devices: str = option("1,8,64,256", "how many, with commas between them")
    devices_a_node: int = option(8, "that see each other over the fast link", least=1)
    tflops: float = option(989.0, "bf16 peak of a device, in 10^12 operations a second", least=1e-6)
    utilisation: float = option(0.4, "share of the peak that trainings reach", least=1e-3, most=1)
    link_gb_s: float = option(450.0, "between devices of a node, in 10^9 bytes a second and direction", least=1e-6)
    network_gb_s: float = option(50.0, "between nodes, for each device", least=1e-6)
    disk_gb_s: float = option(2.0, "for checkpoints", least=1e-6)


@dataclass(frozen=True)
class Counted:
    """What the network itself tells.

    Attributes:
        parameters: how many.
        operations: of the matrix products of one image, forward and backward.
        activations: bytes that the backward pass of one image needs, without autocast, which halves most of them.
    """

    parameters: int
    operations: int
    activations: int


def count(model: nn.Module, shape: tuple[int, int, int]) -> Counted:
    """Count on the meta device; `shape` is (C, H, W) of an input."""
    model = model.to("meta").train()
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        base = tensor if tensor._base is None else tensor._base  # views share what they look at
        if id(base) not in own:
            kept[id(base)] = base
        return tensor

    x, t = torch.empty(1, *shape, device="meta"), torch.empty(1, device="meta")
    with FlopCounterMode(display=False) as counter, saved_tensors_hooks(keep, lambda tensor: tensor):
        model(x, t).sum().backward()
    activations = sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
    return Counted(sum(p.numel() for p in model.parameters()), counter.get_total_flops(), activations)


def traffic(parameters: int, devices: int, sharded: bool) -> float:
    """Bytes that each device sends in a step, in rings: an all-reduce of the gradients; sharded, gathering the weights twice (on the
    way there and back) and scattering the gradients once."""
    part = (devices - 1) / devices * BYTES["gradients"] * parameters
    return (3 if sharded else 2) * part


def step(counted: Counted, machine: Machine, devices: int) -> dict[str, float]:
    """A step on so many devices: bytes and seconds."""
    images = machine.batch_size / devices
    rate = 1e9 * (machine.link_gb_s if devices <= machine.devices_a_node else machine.network_gb_s)
    held = sum(BYTES.values()) * counted.parameters
    return {
        "images": images,
        "whole_bytes": held + images * counted.activations,
        "sharded_bytes": held / devices + images * counted.activations,
        "compute_s": images * counted.operations / (1e12 * machine.tflops * machine.utilisation),
        "whole_s": traffic(counted.parameters, devices, sharded=False) / rate,
        "sharded_s": traffic(counted.parameters, devices, sharded=True) / rate,
    }


def dominated(counted: Counted, machine: Machine, sharded: bool) -> int:
    """The smallest power of two of devices whose traffic takes longer than what they compute."""
    devices = 2
    while (now := step(counted, machine, devices))["sharded_s" if sharded else "whole_s"] <= now["compute_s"]:
        devices *= 2
    return devices


def table(network: Network, counted: Counted, machine: Machine) -> str:
    """All of it, in Markdown."""
    checkpoint = sum(BYTES[part] for part in SAVED) * counted.parameters
    exported = sum(BYTES[part] for part in EXPORTED) * counted.parameters
    read_s, write_s = (size / 1e9 / machine.disk_gb_s for size in (checkpoint, checkpoint + exported))
    lines = [
        f"{in_words(network.backbone, network.size, network.depth)}: {counted.parameters / 1e6:,.1f} M parameters, "
        f"{counted.operations / 1e9:,.0f} GFLOP and at most {counted.activations / 2**20:,.0f} MiB of activations an image, forward and "
        f"backward; a checkpoint has {checkpoint / 1e9:.1f} GB and the exported model {exported / 1e9:.1f} GB: {write_s:.1f} s to "
        f"write and {read_s:.1f} s to read back for its hashes, at {machine.disk_gb_s:g} GB/s.",
        "",
        "| devices | images each | memory whole, GiB | sharded, GiB | computing, ms | traffic whole, ms | sharded, ms |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for devices in _devices(machine.devices):
        now = step(counted, machine, devices)
        sizes_gib = [f"{now[key] / 2**30:.1f}" for key in ("whole_bytes", "sharded_bytes")]
        times = [f"{1e3 * now[key]:.1f}" for key in ("compute_s", "whole_s", "sharded_s")]
        lines.append("| " + " | ".join([str(devices), f"{now['images']:g}", *sizes_gib, *times]) + " |")
    whole, sharded = (dominated(counted, machine, each) for each in (False, True))
    return "\n".join([*lines, "", f"Traffic takes longer than computing from {whole} devices on; sharded, from {sharded}."])


def _devices(text: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise ValueError(f"--devices {text} must be whole numbers from 1 on, with commas between them, such as 8,64")
    return numbers


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    with one_line_errors():
        parser = Parser(description=__doc__)
        for group in (Network, Machine):
            add_options(parser, group)
        parsed = parser.parse_args(arguments)
        network, machine = read_options(parsed, Network), read_options(parsed, Machine)
        _devices(machine.devices)
        with torch.device("meta"):
            model = create_model(**_model_options(network))
        print(table(network, count(model, (network.channels, network.resolution, network.resolution)), machine))


def _model_options(network: Network) -> dict[str, Any]:
    options = asdict(network)
    edge, channels = options.pop("resolution"), options.pop("channels")
    return {**options, "image_size": edge, "in_channels": channels}


if __name__ == "__main__":
    main()
