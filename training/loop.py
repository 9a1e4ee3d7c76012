"""The training loop on accelerate, and nothing else.

Nothing is drawn from global random streams. Which images a step sees follows from the seed and the number of images seen, its
noise from the seed, the step and the position of the micro-batch; so a resumed run repeats the uninterrupted one, and N processes
repeat one process with N times the accumulation.
"""

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from functools import partial, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from models.files import write_json
from models.precision import precision
from training import checkpoint as checkpoint_files
from training.data import TrainingData, seed_of
from training.ema import EMA
from training.loop_options import LoopOptions, check, check_with_data, compiles, learning_rate
from training.memory import keep_freed_memory
from training.monitor import EXPLODED, MetricsFile, feature_statistics
from training.processes import PATIENCE, StopSignals
from training.resume import resume_or_start
from training.sharding import Whole, ZeRO, asks_for_deepspeed, is_sharded, local, prepare
from training.stream import Streams

MAX_SKIPPED = 20  # steps in a row that may be left out

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
    """Train until max_train_steps, max_train_minutes, Ctrl-C or SIGTERM, whichever comes first; each leaves a checkpoint of the last step.

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
    training = _Training(options, model, data, objective, config, export, parameters)
    options, accelerator = training.options, training.accelerator
    quiet = None if accelerator.is_main_process else True  # None: where there is no terminal
    bar = tqdm(total=options.max_train_steps, initial=training.step, desc=training.run.name, unit=" steps", disable=quiet)
    with StopSignals(accelerator) as stop, closing(training.reader):
        while training.step < (options.max_train_steps or math.inf) and not stop.asked(training.step):
            try:
                if not training.take_step(stop):
                    break
            except BackendCompilerFailed:
                if stop.heard():  # Ctrl-C ends the compilers, too
                    break
                raise
            step = training.step
            bar.update()
            looks = [callback for every, callback in callbacks if step % every == 0]
            if looks or step % options.logging_steps == 0 or step == options.max_train_steps:
                told = training.tell(looks)
                bar.set_postfix_str(told)
                if bar.disable and accelerator.is_main_process:  # a log gets lines
                    print(f"step {step}{training.way_left}: {told}", flush=True)
            if step % options.checkpointing_steps == 0:
                training.save()
            if options.max_train_minutes is not None and training.minutes > options.max_train_minutes:
                stop.ask()
        bar.close()
        if training.step != training.saved:
            training.save()
    accelerator.end_training()
    return training.step


class _Training:
    """What a training holds in each of its processes, and what it does in a step; the arguments are those of `train`.

    Attributes:
        options: settled.
        model, bare: as accelerate prepared it, and as it was given.
        step, saved, first_step: how many were taken, were when the last checkpoint was, and were at the beginning.
        batch, generator: of the last micro-batch, for `tell`.
        first_done: when the first step was, on the clock; it may compile.
    """

    batch: dict[str, Tensor]
    generator: torch.Generator
    first_done: float

    def __init__(
        self,
        options: LoopOptions,
        model: nn.Module,
        data: TrainingData,
        objective: Objective,
        config: dict[str, Any],
        export: Export,
        parameters: Iterable[Any] | None,
    ) -> None:
        self.began, self.run = time.monotonic(), Path(options.output_dir or "")
        self.objective, self.export = objective, export
        resolved, batch_size = precision(options.mixed_precision), options.train_batch_size
        self.zero = ZeRO(batch_size, options.gradient_accumulation_steps, options.max_grad_norm) if asks_for_deepspeed() else None
        self.accelerator = _accelerator(options, self.run, "no" if self.zero else resolved, self.zero)
        self.device = self.accelerator.device
        check_with_data(options, data, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        micro_batches = self.accelerator.num_processes * options.gradient_accumulation_steps  # of one step
        self.images_a_step = micro_batches * batch_size
        whole = not (self.zero or is_sharded(self.accelerator))
        options = dataclasses.replace(options, compile=compiles(options, self.device, whole))
        self.options = options = options.settled(self.images_a_step)

        optimizer = torch.optim.AdamW(
            model.parameters() if parameters is None else parameters,
            lr=options.learning_rate,
            betas=(options.adam_beta1, options.adam_beta2),
            weight_decay=options.adam_weight_decay,
            fused=True,
        )
        if options.gradient_checkpointing:
            # nothing is drawn inside a block
            model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=False))
        if options.compile:
            model.compile(dynamic=False)
        self.alphas = list(model.alphas)  # as it begins: learned ones may not be numbers when it breaks down
        self.whole, self.bare = Whole(self.accelerator, model), model
        self.model, self.optimizer = prepare(self.accelerator, model, optimizer, resolved)
        self.ema, self.losses = EMA(model.parameters(), options.ema_decay), _LossMeter(self.accelerator)
        self.data = data.held(self.device)
        self.reader = self.data.reader(options.seed, micro_batches)
        stateful = [self.reader] if isinstance(self.reader, Streams) else []
        self.accelerator.register_for_checkpointing(self.ema, self.losses, *stateful)

        computed = {"precision": resolved, "images_a_step": self.images_a_step, "data_fingerprint": data.fingerprint}
        computed |= {"sharded": self.whole.sharded, "deepspeed_processes": self.accelerator.num_processes if self.zero else 0}
        self.config = {**config, **dataclasses.asdict(options), **computed}
        self.step = self.saved = self.first_step = resume_or_start(self.accelerator, self.run, options, self.config)
        self.skipped = 0  # steps in a row
        self.metrics = MetricsFile(self.run, self.accelerator, self.step)
        self._begin_tracking()
        if self.step and self.step != checkpoint_files.exported_step(self.run):  # killed between the two
            self._publish()
        self.line_began, self.line_step = time.monotonic(), self.step

    def _begin_tracking(self) -> None:
        if self.options.report_to == "tensorboard":
            self.accelerator.init_trackers("logs")  # a folder of the run
        elif self.options.report_to != "none":
            told = {name: value for name, value in self.config.items() if isinstance(value, bool | int | float | str)}
            self.accelerator.init_trackers("fading-shortcuts", told, {"wandb": {"name": self.run.name}})

    @property
    def minutes(self) -> float:
        """Since it began, or went on."""
        return (time.monotonic() - self.began) / 60

    @property
    def way_left(self) -> str:
        """Up to which step, in words, and how long that takes at the pace so far, of which the first step is no part."""
        last, limit = self.options.max_train_steps, self.options.max_train_minutes
        if not last:
            return ""
        words, steps = f" of {last}", self.step - self.first_step - 1
        if last == self.step or not steps:
            return words
        minutes = (last - self.step) * (time.monotonic() - self.first_done) / steps / 60
        return f"{words}, {minutes if limit is None else min(minutes, limit - self.minutes):,.1f} min left"

    @property
    def _images_seen(self) -> int:
        """By the weights: in this run, and before it."""
        return self.config.get("images_before", 0) + self.step * self.images_a_step

    def take_step(self, stop: StopSignals) -> bool:
        """Update the weights and their averages once.

        Returns:
            Whether it was done: many micro-batches take long, and a signal between two of them, if no other process has to hear of it,
            gives the step up; a resumed run takes it from its beginning.

        Raises:
            FloatingPointError: gradients are not finite where they cannot be left out, or time and again.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.options, self.step)
        losses = []
        for accumulated in range(self.options.gradient_accumulation_steps):
            if accumulated and self.accelerator.num_processes == 1 and stop.heard():
                return False
            self.batch, self.generator = self._micro_batch(accumulated)
            with self.accelerator.accumulate(self.model):
                loss = self.objective(self.model, self.batch, self.generator)  # in the precision that prepare() gave the model
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self._clip_gradients()
                self.optimizer.step()
                self.optimizer.zero_grad()
                losses.append(loss.detach())
        for loss in losses:
            if not self.options.skip_nonfinite or loss.isfinite():
                self.losses.add(loss)
        self.step += 1
        if self.step == self.first_step + 1:
            self.first_done = time.monotonic()
        if self.skipped == MAX_SKIPPED:
            raise self._broken(f"gradients are not finite in {self.skipped} steps in a row, up to step {self.step}")
        self.ema.update(self.bare.parameters(), self.step)
        return True

    def _micro_batch(self, accumulated: int) -> tuple[dict[str, Tensor], torch.Generator]:
        """This process's share of the step's images, and what draws their noise."""
        micro = accumulated * self.accelerator.num_processes + self.accelerator.process_index
        rows = self.reader.rows(self.step * self.images_a_step + micro * self.options.train_batch_size, self.options.train_batch_size)
        generator = torch.Generator(self.device).manual_seed(seed_of(self.options.seed, self.step, micro + 1))
        return self.data.batch(rows, self.device, generator, self.options.random_flip), generator

    def _clip_gradients(self) -> None:
        """To `max_grad_norm`; those that are not finite are let go, where that was asked for."""
        if not (self.options.max_grad_norm or self.options.skip_nonfinite or self.zero):
            return
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), self.options.max_grad_norm or math.inf)
        if self.options.skip_nonfinite and not math.isfinite(norm):
            self.optimizer.zero_grad()  # then AdamW has nothing to do
            self.skipped += 1
        elif self.zero and not math.isfinite(norm):  # elsewhere the weights, and so the loss, would tell
            raise self._broken(f"gradients are not finite in step {self.step + 1}, which DeepSpeed leaves out")
        else:
            self.skipped = 0

    def tell(self, looks: Sequence[Callback]) -> str:
        """Write a line of the log, with what `looks` find on the main process; returns it in words.

        Raises:
            FloatingPointError: the loss is not finite, or features have exploded, which the log tells.
        """
        rate = (self.step - self.line_step) * self.images_a_step / (time.monotonic() - self.line_began)
        with torch.compiler.set_stance("force_eager"):  # such calls are rare, and of other shapes
            line: dict[str, Any] = {
                "step": self.step,
                "images": self.step * self.images_a_step,
                "loss": self._mean_loss(),
                "lr": learning_rate(self.options, self.step - 1),
                "images_per_s": round(rate, 2),
                **feature_statistics(self.bare, self.objective.inputs(self.batch, self.generator)[0], self.objective.bottleneck),
            }
            largest_anywhere = self.accelerator.gather(torch.tensor(line["block_norms"], device=self.device)).max().item()
            exploded = not largest_anywhere <= EXPLODED  # what is not a number is none
            if looks and not exploded:  # a look asks for features that can be looked at
                network, averages = self.whole(self.bare, self.ema, to_compute=True)
                if self.accelerator.is_main_process:
                    for look in looks:
                        line |= look(self.run, self.step, network, averages) or {}
        self.metrics.write(line)
        if exploded:
            size = f"after step {self.step} a block puts out numbers of size {largest_anywhere:.2g}: the features explode"
            raise self._broken(size, "begin again with --zero_init, a larger --alpha_min or a lower learning rate")
        self.losses.reset()
        self.line_began, self.line_step = time.monotonic(), self.step
        names = {"probe_knn": "kNN", "probe_linear": "linear probe"}
        found = "".join(f", {name} {100 * line[key]:.1f} %" for key, name in names.items() if key in line)
        minutes = None if self.options.max_train_steps else self.options.max_train_minutes
        left = "" if minutes is None else f", {minutes - self.minutes:.1f} min left"
        return f"loss {line['loss']:.4f}{found}, {rate:.0f} images/s{left}"

    def save(self) -> None:
        """A checkpoint to go on from, and what others load.

        Raises:
            FloatingPointError: the loss or the weights are not finite; then neither is written.
        """
        self._mean_loss()
        infinite = sum((~local(parameter).isfinite()).any().float() for parameter in self.bare.parameters())
        if self.accelerator.reduce(infinite).item():
            raise self._broken(f"weights are not finite after step {self.step}")
        checkpoint_files.save_checkpoint(self.accelerator, self.run, self.step, self.options.checkpoints_total_limit)
        self._publish()
        self.saved = self.step

    def _publish(self) -> None:
        """What others load, from the weights as they are."""
        network, averages = self.whole(self.bare, self.ema, to_compute=False)
        if self.accelerator.is_main_process:
            seen = {"steps": self.step, "images_seen": self._images_seen, "seed": self.options.seed}
            source = {"data": self.data.name, "data_split": self.data.split, "data_fingerprint": self.data.fingerprint}
            columns: dict[str, Any] = {name: self.config[name] for name in ("image_column", "label_column") if name in self.config}
            self.export(self.run, network, averages, {**seen, **source, "images_fingerprint": self.data.images_fingerprint, **columns})

    def _mean_loss(self) -> float:
        mean = self.losses.mean()
        if not math.isfinite(mean):
            raise self._broken(f"the loss is not finite before step {self.step}")
        return mean

    def _broken(self, what: str, remedy: str = "begin again with a lower learning rate, or a larger alpha_min") -> FloatingPointError:
        """Write broke.json, and return the error to raise."""
        last = f"the last checkpoint is of step {self.saved}" if self.saved else "there is no checkpoint yet"
        if self.accelerator.is_main_process:
            broke = {"why": what, "images_seen": self._images_seen, "alphas": self.alphas}
            write_json(self.run / checkpoint_files.BROKE, broke)
        return FloatingPointError(f"{what}; {remedy}; {last}")


def _accelerator(options: LoopOptions, run: Path, mixed_precision: str, zero: ZeRO | None) -> Accelerator:
    """What spreads the work over processes and devices; ValueError if the processes do not see each other."""
    # of gradients there is one copy, not two; tables of positions never change, and need not be sent in every step
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        log_with=None if options.report_to == "none" else options.report_to,
        project_dir=run,
        step_scheduler_with_optimizer=False,
        deepspeed_plugin=zero,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE), ddp],
    )
    if int(os.environ.get("WORLD_SIZE", 1)) != accelerator.num_processes:
        raise ValueError("torchrun's processes do not see each other, as there is no GPU; set ACCELERATE_USE_CPU=True to train on CPUs")
    return accelerator


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
