"""Parameters spread over devices (FSDP2, by accelerate), and the way back to whole ones.

Everything here is a plain pass-through where a process holds whole parameters. What gathers is called by every process.
"""

import copy
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, convert_outputs_to_fp32
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

if TYPE_CHECKING:
    from training.ema import EMA


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds a part of the parameters alone.

    Raises:
        ValueError: accelerate was asked for the first FSDP, or for DeepSpeed.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise ValueError("DeepSpeed averages no weights; use accelerate's FSDP2: --config_file training/configs/fsdp2.yaml")
    if accelerator.distributed_type != DistributedType.FSDP:
        return False
    if not accelerator.is_fsdp2:
        raise ValueError("FSDP 1 flattens the parameters; ask accelerate for version 2: --config_file training/configs/fsdp2.yaml")
    return True


def prepare(accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
    """`accelerator.prepare`. Sharded forward passes run under autocast, as those of one device do.

    FSDP2's own way would round what goes into the blocks, the times too: a DDPM's 999 becomes 1000 in bf16.

    Raises:
        ValueError: a learnable alpha is to be sharded.
    """
    if is_sharded(accelerator):
        check_shareable(model)
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()  # casts nothing
        if accelerator.mixed_precision != "no":
            model.forward = _autocast(accelerator, model.forward)
    return accelerator.prepare(model, optimizer)


def check_shareable(model: nn.Module) -> None:
    """Raise ValueError for parameters that cannot be shared out."""
    if any(not parameter.shape for parameter in model.parameters()):
        raise ValueError("a learnable alpha is a single number, which FSDP cannot share out; leave --learnable_alpha away, or FSDP")


def _autocast(accelerator: Accelerator, forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def cast(*arguments: Any, **options: Any) -> Any:
        with accelerator.autocast():
            return forward(*arguments, **options)

    return convert_outputs_to_fp32(cast)


class Whole:
    """What the main process needs of a model: whole weights and averages, to save, to sample, to probe.

    Args:
        model: before it is prepared; where it is to be sharded the main process keeps a copy of it, on the CPU, to fill.
    """

    def __init__(self, accelerator: Accelerator, model: nn.Module) -> None:
        self.sharded, self.main = is_sharded(accelerator), accelerator.is_main_process
        self.device = accelerator.device
        self.twin = copy.deepcopy(model).cpu() if self.sharded and self.main else None

    @torch.no_grad()
    def __call__(self, model: nn.Module, ema: "EMA", to_compute: bool) -> tuple[nn.Module, "EMA"]:
        """The prepared model and its averages -> the same with whole tensors; of no use in the other processes.

        Args:
            to_compute: put a sharded model's weights on the device; else they stay on the CPU, where there is room for them.
        """
        if not self.sharded:
            return model, ema
        weights = {name: gathered(tensor, self.main) for name, tensor in model.state_dict().items()}
        averages = ema.whole(self.main)
        if self.twin is None:
            return model, averages
        self.twin.load_state_dict(weights)
        return (copy.deepcopy(self.twin).to(self.device) if to_compute else self.twin), averages


def gathered(tensor: Tensor, keep: bool = True) -> Tensor:
    """The whole tensor, on the CPU if it was sharded; where it is not kept, an empty one."""
    if not isinstance(tensor, DTensor):
        return tensor
    whole = tensor.detach().full_tensor()
    return whole.cpu() if keep else whole.new_empty(0)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copy_whole(target: Tensor, whole: Tensor) -> None:
    """Overwrite a tensor, or this process's part of it, with a whole one."""
    target.copy_(distribute_tensor(whole, target.device_mesh, target.placements) if isinstance(target, DTensor) else whole)
