"""Options of the training loop, and what is wrong with them."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.tracking import get_available_trackers

from models.compiling import WORTH_STEPS, has_compiler, has_what_triton_needs, is_worth_it, require_compiler
from models.files import read_json, require_memory, require_writable
from training import checkpoint as checkpoint_files
from training.data import TrainingData
from training.options import option
from training.sharding import FSDP2, asks_for_deepspeed


@dataclass(frozen=True)
class LoopOptions:
    """Optimisation and run."""

    output_dir: str | None = option(None, "folder of the run, made if needed; runs/PRESET where a preset is named")
    seed: int = option(0, "of the initial weights, the order of the data, and the noise", least=0)
    train_batch_size: int = option(64, "images of a process in one forward pass", least=1)
    gradient_accumulation_steps: int = option(1, "forward passes for one optimizer step", least=1)
    mixed_precision: str = option(
        "auto", "auto is bf16 where the hardware has it (on a CPU: avx512_bf16 or AMX), else no", choices=("auto", "no", "bf16", "fp16")
    )
    compile: bool | None = option(
        None,
        "torch.compile the network: a minute or so at the start, then shorter steps (on a CPU a DiT's by a sixth to a quarter, "
        "an MAE's by less than a tenth); other last digits; unless given, on GPUs that hold all parameters, in trainings of "
        f"{WORTH_STEPS:,} steps and more",
    )
    gradient_checkpointing: bool = option(False, "compute each block once more on the way back instead of keeping what is inside")
    max_train_steps: int | None = option(None, "optimizer steps in all", least=1)
    max_train_minutes: float | None = option(None, "save and leave after this long; resuming goes on", least=0)
    learning_rate: float = option(1e-4, "of AdamW, after the warm-up", least=0)
    lr_scheduler: str = option("constant", "after the warm-up; cosine falls to 0 at max_train_steps", choices=("constant", "cosine"))
    lr_warmup_steps: int = option(0, "steps in which the learning rate rises from 0", least=0)
    adam_beta1: float = option(0.9, "AdamW", least=0, most=1)
    adam_beta2: float = option(0.999, "AdamW", least=0, most=1)
    adam_weight_decay: float = option(0.0, "AdamW", least=0)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0 leaves them", least=0)
    skip_nonfinite: bool = option(False, "leave out a step whose gradients are not finite, instead of ending; 20 in a row still end")
    ema_decay: float = option(0.9999, "of the averaged weights, after min(., (1 + step) / (10 + step)); 0: none", least=0, most=1)
    random_flip: bool = option(False, "mirror half of the images")
    checkpointing_steps: int = option(1000, "steps between checkpoints; the last step always gets one", least=1)
    checkpoints_total_limit: int | None = option(2, "older checkpoints are deleted", least=1)
    resume_from_checkpoint: str | None = option(None, '"latest", or the name of one, such as step-1000')
    logging_steps: int = option(50, "steps between lines of metrics.jsonl", least=1)
    sample_steps: int = option(500, "steps between sample grids; 0 for none", least=0)
    probe_every: int = option(
        0, "steps between quick looks at the features (kNN, linear probe, rank of a few labelled images); 0: none", least=0
    )
    probe_images: int = option(
        2500, "training images for each look, about, and two of a class at least; a fifth of them is judged", least=10
    )
    report_to: str = option("tensorboard", "tracker", choices=("tensorboard", "wandb", "none"))

    def settled(self, images_a_step: int) -> "LoopOptions":
        """With all that depends on how many images make a step, which is known once the processes have found each other."""
        return self


def learning_rate(options: LoopOptions, step: int) -> float:
    """Of the step after `step` steps: a linear rise, then constant or a cosine down to 0."""
    if step < options.lr_warmup_steps:
        return options.learning_rate * (step + 1) / options.lr_warmup_steps
    if options.lr_scheduler == "constant":
        return options.learning_rate
    assert options.max_train_steps is not None, "check() asks for it"
    progress = (step - options.lr_warmup_steps) / max(1, options.max_train_steps - options.lr_warmup_steps)
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def check(options: LoopOptions) -> Path:
    """Raise ValueError for options that contradict each other, before anything is spent; returns the run's folder."""
    if options.output_dir is None:
        raise ValueError("--output_dir is missing; name a folder for the run, such as runs/mine")
    if options.max_train_steps is None and options.max_train_minutes is None:
        raise ValueError("neither --max_train_steps nor --max_train_minutes is given; a training needs an end")
    if options.lr_scheduler == "cosine" and options.max_train_steps is None:
        raise ValueError("--lr_scheduler cosine needs --max_train_steps, to know where it ends")
    if options.compile:
        require_compiler()
    if options.report_to not in ("none", *map(str, get_available_trackers())):
        raise ValueError(f"--report_to {options.report_to} needs that library; pip install {options.report_to}, or give --report_to none")
    if asks_for_deepspeed() and options.mixed_precision == "fp16":
        raise ValueError(f"DeepSpeed's own fp16 hides the exact weights from the averages; give --mixed_precision bf16, or {FSDP2}")
    run = Path(options.output_dir)
    for folder in (run, run / "checkpoints"):  # not after hours, when the first checkpoint is due
        require_writable(folder, "choose another --output_dir")
    if options.resume_from_checkpoint is None and checkpoint_files.checkpoints(run):
        raise ValueError(f"{run} already holds a run; add --resume_from_checkpoint latest to go on with it, or choose another --output_dir")
    return run


def compiles(options: LoopOptions, device: torch.device, whole: bool) -> bool:
    """Whether the network is compiled: as asked, as the run began where that can be done, or else where it is worth it.

    Args:
        whole: every process holds all parameters, and steps by torch's own means.
    """
    if options.compile is not None:
        return options.compile
    begun = Path(options.output_dir or "") / checkpoint_files.CONFIG
    if options.resume_from_checkpoint is not None and begun.is_file():
        return bool(read_json(begun).get("compile")) and (has_compiler() if device.type == "cpu" else has_what_triton_needs())
    return whole and is_worth_it(device, options.max_train_steps, options.max_train_minutes)


def check_with_data(options: LoopOptions, data: TrainingData, device: torch.device) -> None:
    """Raise ValueError for a batch that cannot fit into memory, and for a run that would lie among its own images."""
    run, folder = Path(options.output_dir or "").resolve(), Path(data.name).resolve()
    if folder.is_dir() and run.is_relative_to(folder):
        raise ValueError(f"--output_dir {run} lies in {data.name}, whose pictures are the data; choose a folder outside")
    needed = 2 * 4 * options.train_batch_size * math.prod(data.shape)  # the images and what is predicted of them, float32
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    require_memory(needed, f"--train_batch_size {options.train_batch_size}", free)
