"""Accelerate's engines that spread a training over devices: FSDP2, and the way back to whole parameters; DeepSpeed's ZeRO-1 and 2.

Everything here is a plain pass-through where a process holds whole parameters. What gathers is called by every process.
"""

import copy
import importlib.util
import os
import pickle
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import DistributedType, convert_outputs_to_fp32, parse_flag_from_env
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from models.precision import autocast

if TYPE_CHECKING:
    from training.ema import EMA

FSDP2 = "use accelerate's FSDP2: --config_file training/configs/fsdp2.yaml"


def is_sharded(accelerator: Accelerator) -> bool:
    """Whether each process holds a part of the parameters alone.

    Raises:
        ValueError: accelerate was asked for the first FSDP.
    """
    if accelerator.distributed_type != DistributedType.FSDP:
        return False
    if not accelerator.is_fsdp2:
        raise ValueError("FSDP 1 flattens the parameters; ask accelerate for version 2: --config_file training/configs/fsdp2.yaml")
    return True


def asks_for_deepspeed() -> bool:
    """Whether accelerate was asked for DeepSpeed, in a way that trains exact weights which every process holds whole.

    ZeRO-1 and 2 on float32 weights do, with bf16 by autocast; then averages and exports see what is trained.

    Raises:
        ValueError: it was asked for in another way, or is not installed.
    """
    if not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return False
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if stage not in ("1", "2"):
        raise ValueError(f"DeepSpeed's ZeRO-{stage} is not supported, ZeRO-1 and 2 are; to share the weights out too, {FSDP2}")
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") != "none":
        raise ValueError(f"a deepspeed_config_file is not supported; use training/configs/deepspeed.yaml, or {FSDP2}")
    if importlib.util.find_spec("deepspeed") is None:
        raise ValueError(f"DeepSpeed is not installed; pip install deepspeed, or {FSDP2}")
    return True


class ZeRO(DeepSpeedPlugin):
    """What DeepSpeed gets to know of the command's flags; it clips and accumulates itself."""

    def __init__(self, batch_size: int, accumulation: int, max_norm: float) -> None:
        super().__init__(gradient_accumulation_steps=accumulation, gradient_clipping=max_norm)
        self.deepspeed_config["train_micro_batch_size_per_gpu"] = batch_size

    def set_deepspeed_weakref(self) -> None:
        """Tells transformers, which nothing here needs."""


def load_state(accelerator: Accelerator, checkpoint: Path) -> None:
    """`accelerator.load_state`, which unpickles no foreign code.

    Raises:
        ValueError: the checkpoint holds some.
    """
    trust_plain_data_alone(accelerator.distributed_type == DistributedType.DEEPSPEED)
    try:
        accelerator.load_state(str(checkpoint))
    except pickle.UnpicklingError as error:
        raise ValueError(f"{checkpoint} holds more than numbers ({str(error).splitlines()[0][:120]}); nothing of it was run") from error


def trust_plain_data_alone(deepspeed: bool) -> None:
    """accelerate and DeepSpeed have torch unpickle whatever is in files: from now on tensors, numbers and three classes of DeepSpeed's."""
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    if not deepspeed:
        return
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum, fragment_address])


def prepare(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer, precision: str
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """`accelerator.prepare`. Under every engine forward passes run under autocast, as those of one device do.

    FSDP2's own way would round what goes into the blocks, the times too: a DDPM's 999 becomes 1000 in bf16. DeepSpeed's own way keeps
    the exact weights inside its optimizer, where averages and exports do not see them.

    Raises:
        ValueError: a learnable alpha is to be sharded.
    """
    sharded = is_sharded(accelerator)
    if sharded:
        check_shareable(model)
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()  # casts nothing
    if precision != "no" and (sharded or accelerator.distributed_type == DistributedType.DEEPSPEED):
        under_autocast = autocast(accelerator.device, precision)(type(model).forward)
        model.forward = MethodType(convert_outputs_to_fp32(under_autocast), model)
    return accelerator.prepare(model, optimizer)


def check_shareable(model: nn.Module) -> None:
    """Raise ValueError for parameters that cannot be shared out."""
    if any(not parameter.shape for parameter in model.parameters()):
        raise ValueError("a learnable alpha is a single number, which FSDP cannot share out; leave --learnable_alpha away, or FSDP")


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


def gathered(tensor: Tensor, keep: bool) -> Tensor:
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
