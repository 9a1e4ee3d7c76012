"""Begin a run, or go on with one where it stopped."""

import math
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from models.files import read_json, write_json
from training import checkpoint as checkpoint_files
from training.loop_options import LoopOptions
from training.sharding import load_state

# Options that may differ when a run is resumed; all others decide what is computed. Another number of processes is made up for by
# another accumulation: images_a_step stays. Compiled or not changes last digits, but a run may go on where there is no compiler.
FREE_ON_RESUME = frozenset(
    "output_dir max_train_minutes checkpointing_steps checkpoints_total_limit resume_from_checkpoint report_to sample_steps "
    "gradient_accumulation_steps compile probe_every probe_images metrics_during_training metrics_samples metrics_extractor "
    "logging_steps preset dataset_name train_data_dir".split()  # data are known by their fingerprint, wherever they lie
)


def resume_or_start(accelerator: Accelerator, run: Path, options: LoopOptions, config: dict[str, Any]) -> int:
    """Load the asked checkpoint, or make the folder of a new run; returns the steps that were already taken.

    Raises:
        ValueError: no such checkpoint, none that can be read, or of a training that computes something else.
    """
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
    _refuse_another_run(run, options, before, config)
    if before.get("gradient_accumulation_steps") != config["gradient_accumulation_steps"]:
        processes = f"{accelerator.num_processes} process{'es' * (accelerator.num_processes > 1)}"
        accelerator.print(f"going on with {processes}: the same images and noise as before; sums have another order, so last digits differ")
    if bool(before.get("compile")) != config["compile"]:
        accelerator.print(f"going on {'' if config['compile'] else 'not '}compiled, other than before: last digits differ")
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


def _refuse_another_run(run: Path, options: LoopOptions, before: dict[str, Any], config: dict[str, Any]) -> None:
    """Raise ValueError where what the run's folder tells of it, `before`, is not what is to go on."""
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
