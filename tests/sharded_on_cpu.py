"""A training script under FSDP2 or DeepSpeed on CPUs, which accelerate offers for accelerators alone.

python -m torch.distributed.run --standalone --nproc_per_node 2 tests/sharded_on_cpu.py training/train_diffusion.py ...
accelerate launch --config_file training/configs/deepspeed.yaml --num_processes 2 tests/sharded_on_cpu.py training/train_diffusion.py ...
"""

import os
import runpy
import sys

from accelerate.state import AcceleratorState, DistributedType, PartialState

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def as_on_accelerators(state: AcceleratorState, *arguments: object, **options: object) -> None:
    """`AcceleratorState.__init__`, and what it does with a plugin on GPUs."""
    initialise(state, *arguments, **options)
    fsdp, deepspeed = options.get("fsdp_plugin"), options.get("deepspeed_plugin")
    if fsdp is not None:
        if state._mixed_precision != "no":
            fsdp.set_mixed_precision(state._mixed_precision)
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        state.fsdp_plugin = fsdp
    if deepspeed is not None:
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.DEEPSPEED
        deepspeed.set_mixed_precision(state._mixed_precision)
        deepspeed.select(_from_accelerator_state=True)
        state.deepspeed_plugins = deepspeed


if __name__ == "__main__":
    os.environ["ACCELERATE_USE_CPU"] = "True"
    if "ACCELERATE_USE_DEEPSPEED" in os.environ:
        os.environ["DS_ACCELERATOR"] = "cpu"
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__.clear()  # else a minute of compiling them
    else:
        os.environ.update(FSDP2)
    initialise = AcceleratorState.__init__
    AcceleratorState.__init__ = as_on_accelerators
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
