"""Where to compute, and in which precision."""

import platform
from contextlib import suppress
from pathlib import Path

import torch
from accelerate.utils import parse_flag_from_env


def uses_gpu() -> bool:
    """Whether there is a GPU, and `accelerate launch` was not given --cpu."""
    return torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")


def device_name() -> str:
    """Of the GPU that is used, else "cpu"."""
    return torch.cuda.get_device_name() if uses_gpu() else "cpu"


def cpu_name() -> str:
    """As its maker calls it, where the system tells."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def precision(wanted: str) -> str:
    """Which pays here: resolve "auto" to "bf16" or "no"; anything else is returned as it is.

    bf16 on a GPU and on CPUs that compute in it (avx512_bf16, AMX); elsewhere it is emulated and far slower than fp32.
    """
    if wanted != "auto":
        return wanted
    if uses_gpu():
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    return "bf16" if cpu_has_bf16() else "no"


def cpu_has_bf16() -> bool:
    """Whether this CPU computes in bf16."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def autocast(device: torch.device, resolved: str) -> torch.autocast:
    """The context in which a forward pass runs in a resolved precision; all but "bf16" and "fp16" is fp32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(resolved, torch.float32)
    return torch.autocast(device.type, dtype, enabled=resolved in ("bf16", "fp16"))
