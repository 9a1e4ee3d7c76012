"""The training loop on accelerate, and nothing else.

Nothing is drawn from global random streams. Which images a step sees follows from the seed and the number of images seen, its
noise from the seed, the step and the position of the micro-batch; so a resumed run repeats the uninterrupted one, and N processes
repeat one process with N times the accumulation.
"""

import dataclasses
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from tqdm import tqdm

from models.files import read_json, require_memory, require_writable, write_json
from models.precision import precision
from training import checkpoint as checkpoint_files
from training.data import TrainingData, seed_of
from training.ema import EMA
from training.memory import keep_freed_memory
from training.monitor import EXPLODED, MetricsFile, feature_statistics
from training.options import option
from training.processes import PATIENCE, StopSignals
from training.sharding import FSDP2, Whole, ZeRO, asks_for_deepspeed, load_state, local, prepare
from training.stream import Streams

MAX_SKIPPED = 20  # steps in a row that may be left out

# Options that may differ when a run is resumed; all others decide what is computed. Another number of processes is made up for by
# another accumulation: images_a_step stays.
FREE_ON_RESUME = frozenset(
    "output_dir max_train_minutes checkpointing_steps checkpoints_total_limit resume_from_checkpoint report_to sample_steps "
    "gradient_accumulation_steps probe_every probe_images metrics_during_training metrics_samples metrics_extractor "
    "logging_steps preset dataset_name train_data_dir".split()  # data are known by their fingerprint, wherever they lie
)

P = ParamSpec("P")

# f(run, model, averaged weights, what the run went through), on the main process: writes what others load
Export = Callable[[Path, nn.Module, EMA, dict[str, Any]], None]
# f(run, step, model, averaged weights) -> numbers for the log, if it finds any; on the main process
Callback = Callable[[Path, int, nn.Module, EMA], dict[str, float] | None]


class Objective(Protocol):
    """What is minimised; see training/objectives.py."""

    @staticmethod
    def bottleneck(num_blocks: int) -> int:
        """Of so many blocks the one whose rank is told."""
        ...

    def inputs(self, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Any, ...]:
        """The model's arguments, and what the loss needs besides."""
        ...

    def __call__(self, model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """The loss."""
        ...


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
    compile: bool = option(False, "torch.compile the network: minutes at the start, then faster steps; other last digits")
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
    probe_images: int = option(2500, "training images for each look, of which a fifth is judged", least=10)
    report_to: str = option("tensorboard", "tracker", choices=("tensorboard", "wandb", "none"))

    def settled(self, images_a_step: int) -> "LoopOptions":
        """With all that depends on how many images make a step, which is known once the processes have found each other."""
        return self


def _alone_in_its_folder(train: Callable[Concatenate["LoopOptions", P], int]) -> Callable[Concatenate["LoopOptions", P], int]:
    """`train` with options that were checked, while no other training works in the folder of the run."""

    @wraps(train)
    def alone(options: LoopOptions, *rest: P.args, **more: P.kwargs) -> int:
        with checkpoint_files.locked(check(options)):
            return train(options, *rest, **more)

    return alone


@_alone_in_its_folder
def train(
    options: LoopOptions,
    model: nn.Module,
    data: TrainingData,
    objective: Objective,
    config: dict[str, Any],
    export: Export,
    callbacks: Sequence[tuple[int, Callback]] = (),
    parameters: Iterable[Any] | None = None,
) -> int:
    """Train until max_train_steps, max_train_minutes, Ctrl-C or SIGTERM, whichever comes first; each leaves a checkpoint.

    Args:
        model: with fresh weights; resuming overwrites them.
        objective: see training/objectives.py; its `inputs` gives the model's arguments, its `bottleneck` the block whose rank is told.
        config: everything else that the run is made of; saved in config.json, and compared when resuming.
        export: called with each checkpoint.
        callbacks: each with the number of steps after which it is called again, on the main process; such a step gets a line in the
            log, with what they tell.
        parameters: what AdamW gets, such as groups with a weight decay of their own; else the model's.

    Returns:
        The step that was reached.

    Raises:
        ValueError: options that contradict each other, a folder that already holds a run or in which another training works, a
            checkpoint that does not fit.
        FloatingPointError: the loss is not finite, or features have exploded; the last checkpoint is kept, and broke.json says why.
    """
    began, run = time.monotonic(), Path(options.output_dir or "")
    batch_size, resolved = options.train_batch_size, precision(options.mixed_precision)
    zero = ZeRO(batch_size, options.gradient_accumulation_steps, options.max_grad_norm) if asks_for_deepspeed() else None
    accelerator = Accelerator(
        mixed_precision="no" if zero else resolved,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        log_with=None if options.report_to == "none" else options.report_to,
        project_dir=run,
        step_scheduler_with_optimizer=False,
        deepspeed_plugin=zero,
        # of DDP's gradients there is one copy then, not two
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE), DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    if int(os.environ.get("WORLD_SIZE", 1)) != accelerator.num_processes:
        raise ValueError("torchrun's processes do not see each other, as there is no GPU; set ACCELERATE_USE_CPU=True to train on CPUs")
    device = accelerator.device
    check_with_data(options, data, device)
    if device.type == "cpu":
        keep_freed_memory()
    micro_batches = accelerator.num_processes * options.gradient_accumulation_steps  # of one step
    images_a_step = micro_batches * batch_size
    options = options.settled(images_a_step)

    optimizer = torch.optim.AdamW(
        model.parameters() if parameters is None else parameters,
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        weight_decay=options.adam_weight_decay,
        fused=True,
    )
    if options.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if options.compile:
        model.compile(dynamic=False)
    alphas = list(model.alphas)  # as it begins: learned ones may not be numbers when it breaks down
    whole = Whole(accelerator, model)
    bare, (model, optimizer) = model, prepare(accelerator, model, optimizer, resolved)
    ema, losses = EMA(bare.parameters(), options.ema_decay), _LossMeter(accelerator)
    data = data.held(device)
    order = data.order(options.seed, micro_batches)
    stateful = [order] if isinstance(order, Streams) else []
    accelerator.register_for_checkpointing(ema, losses, *stateful)

    computed = {"precision": resolved, "images_a_step": images_a_step, "data_fingerprint": data.fingerprint}
    computed |= {"sharded": whole.sharded, "deepspeed_processes": accelerator.num_processes if zero else 0}
    config = {**config, **dataclasses.asdict(options), **computed}
    step = _resume_or_start(accelerator, run, options, config)
    metrics = MetricsFile(run, accelerator, step)
    if options.report_to == "tensorboard":
        accelerator.init_trackers("logs")  # a folder of the run
    elif options.report_to != "none":
        told = {name: value for name, value in config.items() if isinstance(value, bool | int | float | str)}
        accelerator.init_trackers("fading-shortcuts", told, {"wandb": {"name": run.name}})

    def broken(what: str, remedy: str = "begin again with a lower learning rate, or a larger alpha_min") -> FloatingPointError:
        last = f"the last checkpoint is of step {saved}" if saved else "there is no checkpoint yet"
        if accelerator.is_main_process:
            seen = config.get("images_before", 0) + step * images_a_step
            write_json(run / checkpoint_files.BROKE, {"why": what, "images_seen": seen, "alphas": alphas})
        return FloatingPointError(f"{what}; {remedy}; {last}")

    def mean_loss() -> float:
        mean = losses.mean()
        if not math.isfinite(mean):
            raise broken(f"the loss is not finite before step {step}")
        return mean

    def save() -> None:
        mean_loss()
        infinite = sum((~local(parameter).isfinite()).any().float() for parameter in bare.parameters())
        if accelerator.reduce(infinite).item():
            raise broken(f"weights are not finite after step {step}")
        checkpoint_files.save_checkpoint(accelerator, run, step, options.checkpoints_total_limit)
        publish()

    def publish() -> None:
        network, averages = whole(bare, ema, to_compute=False)
        if accelerator.is_main_process:
            seen = {"steps": step, "images_seen": config.get("images_before", 0) + step * images_a_step, "seed": options.seed}
            source = {"data": data.name, "data_split": data.split, "data_fingerprint": data.fingerprint}
            columns: dict[str, Any] = {name: config[name] for name in ("image_column", "label_column") if name in config}
            export(run, network, averages, {**seen, **source, "images_fingerprint": data.images_fingerprint, **columns})

    if step and step != checkpoint_files.exported_step(run):  # killed between the two
        publish()

    saved, skipped = step, 0
    line_began, line_step = time.monotonic(), step
    bar = tqdm(
        total=options.max_train_steps, initial=step, desc=run.name, unit=" steps", disable=None if accelerator.is_main_process else True
    )
    with StopSignals(accelerator) as stop, closing(order):
        while step < (options.max_train_steps or math.inf) and not stop.asked(step):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(options, step)
            for accumulated in range(options.gradient_accumulation_steps):
                micro = accumulated * accelerator.num_processes + accelerator.process_index
                indices = order.indices(step * images_a_step + micro * batch_size, batch_size)
                generator = torch.Generator(device).manual_seed(seed_of(options.seed, step, micro + 1))
                batch = data.batch(indices, device, generator, options.random_flip)
                with accelerator.accumulate(model):
                    loss = objective(model, batch, generator)  # prepare() made the model's forward run in the wanted precision
                    accelerator.backward(loss)
                    if accelerator.sync_gradients and (options.max_grad_norm or options.skip_nonfinite or zero):
                        norm = accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm or math.inf)
                        if options.skip_nonfinite and not math.isfinite(norm):
                            optimizer.zero_grad()  # then AdamW has nothing to do
                            skipped += 1
                        elif zero and not math.isfinite(norm):  # elsewhere the weights, and so the loss, would tell
                            raise broken(f"gradients are not finite in step {step + 1}, which DeepSpeed leaves out")
                        else:
                            skipped = 0
                    optimizer.step()
                    optimizer.zero_grad()
                    if not options.skip_nonfinite or loss.isfinite():
                        losses.add(loss)
            step += 1
            if skipped == MAX_SKIPPED:
                raise broken(f"gradients are not finite in {skipped} steps in a row, up to step {step}")
            ema.update(bare.parameters(), step)
            bar.update()

            looks = [callback for every, callback in callbacks if step % every == 0]
            if looks or step % options.logging_steps == 0 or step == options.max_train_steps:
                rate = (step - line_step) * images_a_step / (time.monotonic() - line_began)
                with torch.compiler.set_stance("force_eager"):  # such calls are rare, and of other shapes
                    statistics = feature_statistics(bare, objective.inputs(batch, generator)[0], objective.bottleneck)
                    line = {
                        "step": step,
                        "images": step * images_a_step,
                        "loss": mean_loss(),
                        "lr": learning_rate(options, step - 1),
                        "images_per_s": round(rate, 2),
                        **statistics,
                    }
                    largest = accelerator.gather(torch.tensor(line["block_norms"], device=device)).max().item()  # of all processes
                    exploded = not largest <= EXPLODED  # what is not a number is none
                    if looks and not exploded:  # a look asks for features that can be looked at
                        network, averages = whole(bare, ema, to_compute=True)
                        if accelerator.is_main_process:
                            for look in looks:
                                line |= look(run, step, network, averages) or {}
                metrics.write(line)
                if exploded:
                    size = f"after step {step} a block puts out numbers of size {largest:.2g}: the features explode"
                    raise broken(size, "begin again with --zero_init, a larger --alpha_min or a lower learning rate")
                minutes = None if options.max_train_steps else options.max_train_minutes
                left = "" if minutes is None else f", {minutes - (time.monotonic() - began) / 60:.1f} min left"
                names = {"probe_knn": "kNN", "probe_linear": "linear probe"}
                found = "".join(f", {name} {100 * line[key]:.1f} %" for key, name in names.items() if key in line)
                text = f"loss {line['loss']:.4f}{found}, {rate:.0f} images/s{left}"
                bar.set_postfix_str(text)
                if bar.disable and accelerator.is_main_process:  # not a terminal: a log gets lines
                    print(f"step {step}{f' of {options.max_train_steps}' if options.max_train_steps else ''}: {text}", flush=True)
                losses.reset()
                line_began, line_step = time.monotonic(), step
            if step % options.checkpointing_steps == 0:
                save()
                saved = step
            if options.max_train_minutes is not None and time.monotonic() - began > 60 * options.max_train_minutes:
                stop.ask()
        bar.close()
        if step != saved:
            save()
    accelerator.end_training()
    return step


def learning_rate(options: LoopOptions, step: int) -> float:
    """Of the step after `step` steps: a linear rise, then constant or a cosine down to 0."""
    if step < options.lr_warmup_steps:
        return options.learning_rate * (step + 1) / options.lr_warmup_steps
    if options.lr_scheduler == "constant":
        return options.learning_rate
    assert options.max_train_steps is not None, "check() asks for it"
    progress = (step - options.lr_warmup_steps) / max(1, options.max_train_steps - options.lr_warmup_steps)
    return options.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


class _LossMeter:
    """Mean of the losses since the last line; stays on the device until it is read, and travels with checkpoints."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.reset()

    def reset(self) -> None:
        self.total, self.count = torch.zeros((), device=self.accelerator.device), 0.0

    def add(self, loss: Tensor) -> None:
        self.total += loss.detach()
        self.count += 1

    def mean(self) -> float:
        """Over all losses of all processes; every process calls this. 0 if nothing was added."""
        # all processes hold the same from now on: a checkpoint keeps what the main one holds
        self.total, count = self.accelerator.reduce(torch.stack([self.total, self.total.new_tensor(self.count)]), "mean")
        self.count = count.item()
        return self.total.item() / max(self.count, 1 / self.accelerator.num_processes)

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.count = state["total"].to(self.accelerator.device), state["count"]


def check(options: LoopOptions) -> Path:
    """Raise ValueError for options that contradict each other, before anything is spent; returns the run's folder."""
    if options.output_dir is None:
        raise ValueError("--output_dir is missing; name a folder for the run, such as runs/mine")
    if options.max_train_steps is None and options.max_train_minutes is None:
        raise ValueError("neither --max_train_steps nor --max_train_minutes is given; a training needs an end")
    if options.lr_scheduler == "cosine" and options.max_train_steps is None:
        raise ValueError("--lr_scheduler cosine needs --max_train_steps, to know where it ends")
    if options.compile and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))):
        raise ValueError("--compile needs a C++ compiler; install one (Debian: apt-get install g++), or leave it away")
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


def check_with_data(options: LoopOptions, data: TrainingData, device: torch.device) -> None:
    """Raise ValueError for a batch that cannot fit into memory, and for a run that would lie among its own images."""
    run, folder = Path(options.output_dir or "").resolve(), Path(data.name).resolve()
    if folder.is_dir() and run.is_relative_to(folder):
        raise ValueError(f"--output_dir {run} lies in {data.name}, whose pictures are the data; choose a folder outside")
    needed = 2 * 4 * options.train_batch_size * math.prod(data.shape)  # the images and what is predicted of them, float32
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None
    require_memory(needed, f"--train_batch_size {options.train_batch_size}", free)


def _resume_or_start(accelerator: Accelerator, run: Path, options: LoopOptions, config: dict[str, Any]) -> int:
    """Load the asked checkpoint, or make the folder of a new run; returns the steps that were already taken."""
    if accelerator.is_main_process:
        checkpoint_files.remove_leftovers(run)
    if options.resume_from_checkpoint is None:
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (run / checkpoint_files.BROKE).unlink(missing_ok=True)
            write_json(run / checkpoint_files.CONFIG, {**config, **checkpoint_files.run_metadata()})
        return 0
    checkpoint = checkpoint_files.find_checkpoint(run, options.resume_from_checkpoint)
    step = checkpoint_files.step_of(checkpoint)
    later = ", ".join(path.name for path in checkpoint_files.checkpoints(run) if checkpoint_files.step_of(path) > step)
    if later and options.resume_from_checkpoint != "latest":
        if step >= (options.max_train_steps or math.inf):
            raise ValueError(f"{checkpoint.name} has --max_train_steps {step} already, and {later} would be lost; ask for more steps")
        accelerator.print(f"going on from {checkpoint.name}; {later} will be replaced")
    before = read_json(run / checkpoint_files.CONFIG)
    free = FREE_ON_RESUME | ({"max_train_steps"} if options.lr_scheduler == "constant" else set())
    if before.get("sharded", False) != config["sharded"]:
        how = "without" if config["sharded"] else "with"
        raise ValueError(f"{run} was trained {how} --config_file training/configs/fsdp2.yaml; go on {how} it, or start another run")
    parts = before.get("deepspeed_processes", 0)  # its checkpoints have a part of the moments for each
    if parts != config["deepspeed_processes"]:
        how = f"by DeepSpeed with --num_processes {parts}" if parts else "without DeepSpeed"
        raise ValueError(f"{run} was trained {how}; go on like that, or start another run")
    changed = [key for key in config if key not in free and key in before and before[key] != config[key]]
    if changed:
        what = ", ".join(f"{key} was {before[key]} and is {config[key]}" for key in changed)
        raise ValueError(f"{run} cannot be resumed with other options ({what}); give the first ones, or start another run")
    if before.get("gradient_accumulation_steps") != config["gradient_accumulation_steps"]:
        processes = f"{accelerator.num_processes} process{'es' * (accelerator.num_processes > 1)}"
        accelerator.print(f"going on with {processes}: the same images and noise as before; sums have another order, so last digits differ")
    load_state(accelerator, checkpoint)
    accelerator.step = 0  # micro-batches of a step, whose number may have been another; a checkpoint lies between two steps
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:  # later ones are damaged or given up: the run goes on from here
        checkpoint_files.drop_after(run, checkpoint)
        checkpoint_files.drop_before(run, options.checkpoints_total_limit)
        (run / checkpoint_files.BROKE).unlink(missing_ok=True)
        told = {**before, "max_train_steps": options.max_train_steps or before.get("max_train_steps")}
        if step < (options.max_train_steps or math.inf):
            told["continued"] = checkpoint_files.continued(before, step)
        if told != {"continued": [], **before}:
            write_json(run / checkpoint_files.CONFIG, told)
    return step
