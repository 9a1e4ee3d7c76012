"""FSDP2 with processes that find each other over gloo: the same training, each process with its part of everything."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from app.catalog import Source
from app.sampler import PipelineCache
from models.pipeline import Pipeline
from training.sharding import check_shareable

FLAGS = "--resolution 16 --size XS --alpha_min 0.6 --train_batch_size 4 --mixed_precision no --report_to none"
MORE = "--logging_steps 1 --sample_steps 4 --checkpointing_steps 2 --ema_decay 0.9"


@pytest.fixture
def sharded(image_folder: Path, run_script: Callable) -> Callable[..., subprocess.CompletedProcess]:
    """sharded(2, "training/train_diffusion.py", "--output_dir", run): as many processes; returns once all have ended."""

    def run(processes: int, script: str, *flags: object) -> subprocess.CompletedProcess:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "tests/sharded_on_cpu.py"]
        return run_script(*launcher, script, "--train_data_dir", image_folder, *FLAGS.split(), *MORE.split(), *flags)

    return run


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def grid(run: Path, step: int) -> np.ndarray:
    return np.asarray(Image.open(run / "samples" / f"step-{step}.png")).astype(int)


@pytest.mark.slow
def test_sharded_over_two_then_four_processes_it_is_the_training_of_one(
    image_folder: Path, sharded: Callable, run_here: Callable, tmp_path: Path
) -> None:
    alone, spread = tmp_path / "alone", tmp_path / "spread"
    flags = [*FLAGS.split(), *MORE.split(), "--gradient_accumulation_steps", 4, "--max_train_steps", 6, "--patch_size", 8]
    assert run_here("training/train_diffusion.py", "--train_data_dir", image_folder, *flags, "--output_dir", alone)[0] == 0
    command = ["training/train_diffusion.py", "--output_dir", spread, "--patch_size", 8]
    done = sharded(2, *command, "--gradient_accumulation_steps", 2, "--max_train_steps", 4)
    assert done.returncode == 0, done.stderr
    done = sharded(4, *command, "--max_train_steps", 6, "--resume_from_checkpoint", "latest")
    assert done.returncode == 0, done.stderr
    assert "going on with 4 processes" in done.stdout

    np.testing.assert_allclose(losses(spread), losses(alone), rtol=1e-5)
    assert np.abs(grid(spread, 4) - grid(alone, 4)).max() <= 1, "sampled by the main process from averages that all hold"
    for averaged in (True, False):
        one, other = (Pipeline.from_pretrained(run, ema=averaged).model.state_dict() for run in (alone, spread))
        for name in one:
            torch.testing.assert_close(other[name], one[name], rtol=0, atol=1e-6)
    assert (spread / "checkpoints" / "step-4" / "pytorch_model_fsdp.bin").is_file(), "it was sharded"
    for averaged in (True, False):  # as the page shows earlier steps
        one, other = (PipelineCache().get(Source(run, averaged, 4)).model.state_dict() for run in (alone, spread))
        for name in one:
            torch.testing.assert_close(other[name], one[name], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_unet_is_sharded_block_by_block(sharded: Callable, tmp_path: Path) -> None:
    done = sharded(2, "training/train_diffusion.py", "--backbone", "unet", "--output_dir", tmp_path / "run", "--max_train_steps", 2)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "checkpoints" / "step-2" / "pytorch_model_fsdp.bin").is_file()


def test_what_cannot_be_sharded_is_told(tiny_dit: Callable) -> None:
    check_shareable(tiny_dit(alpha_min=0.5))
    with pytest.raises(ValueError, match="a learnable alpha is a single number"):
        check_shareable(tiny_dit(alpha_min=0.5, learnable_alpha=True))
