"""A training script under FSDP2 on CPUs, which accelerate offers for accelerators alone.

python -m torch.distributed.run --standalone --nproc_per_node 2 tests/sharded_on_cpu.py training/train_diffusion.py ...
"""

import os
import runpy
import sys

from accelerate.state import AcceleratorState, DistributedType, PartialState

ENVIRONMENT = {
    "ACCELERATE_USE_CPU": "True",
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}


def as_on_accelerators(state: AcceleratorState, *arguments: object, **options: object) -> None:
    """`AcceleratorState.__init__`, and what it does with an FSDP plugin on GPUs."""
    initialise(state, *arguments, **options)
    plugin = options.get("fsdp_plugin")
    if plugin is not None:
        if state._mixed_precision != "no":
            plugin.set_mixed_precision(state._mixed_precision)
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        state.fsdp_plugin = plugin


if __name__ == "__main__":
    os.environ.update(ENVIRONMENT)
    initialise = AcceleratorState.__init__
    AcceleratorState.__init__ = as_on_accelerators
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
