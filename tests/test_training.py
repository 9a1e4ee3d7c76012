"""The loop: exact resumption, processes, signals, files, bad input."""

import gc
import inspect
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from safetensors.torch import load_file
from torch._inductor.exc import InductorError
from torch.utils._python_dispatch import TorchDispatchMode

from eval.fid import has_changed, training_data
from models import Pipeline, create_model, effective_alpha
from models.files import read_json, sha256, write_json
from models.paths import data_from_prediction
from models.precision import cpu_name, precision, uses_gpu
from tests.conftest import ROOT, script_environment, wait_for
from tests.processes import run_together
from training import loop, train_mae
from training.checkpoint import BROKE, averaged, checkpoints, continued, find_checkpoint, locked, revisions, run_metadata
from training.command import describe, parse
from training.data import Order
from training.ema import EMA
from training.loop_options import LoopOptions, check, compiles, learning_rate
from training.monitor import read_metrics
from training.objectives import BETA_SCHEDULES, DDPM, PREDICTION_TYPES, TIME_DISTRIBUTIONS, FlowMatching
from training.presets import PRESETS
from training.resume import FREE_ON_RESUME
from training.train_diffusion import GROUPS, main

SCRIPT = "training/train_diffusion.py"
TINY = [
    "--resolution", "8", "--patch_size", "4", "--alpha_min", "0.6", "--train_batch_size", "4", "--learning_rate", "1e-3",
    "--logging_steps", "2", "--sample_steps", "0", "--report_to", "none", "--mixed_precision", "no",
]  # fmt: skip


@pytest.fixture(scope="module")
def train(image_folder: Path) -> Callable:
    """train(run, *flags): a run of the script on the image folder, in this process, that must succeed."""

    def train(run: Path, *flags: object) -> None:
        AcceleratorState._reset_state(True)
        main([*map(str, ["--train_data_dir", image_folder, "--output_dir", run, *TINY, *flags])])
        AcceleratorState._reset_state(True)

    return train


@pytest.fixture(scope="module")
def whole_run(run_script: Callable, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as users start it."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    flags = ["--max_train_steps", 10, "--checkpointing_steps", 5, "--sample_steps", 5, "--random_flip", "--lr_warmup_steps", 3]
    done = run_script(SCRIPT, "--train_data_dir", image_folder, "--output_dir", run, *TINY, *flags)
    assert done.returncode == 0, done.stderr
    return run


def assert_same_weights(a: Path, b: Path) -> None:
    for part in ("model", "ema"):
        first, second = (load_file(run / part / "diffusion_pytorch_model.safetensors") for run in (a, b))
        assert first.keys() == second.keys()
        for name in first:
            assert torch.equal(first[name], second[name]), f"{part} {name}"


def without_speed(run: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key != "images_per_s"} for line in read_metrics(run)]


def test_a_run_on_disk(whole_run: Path) -> None:
    files = {str(path.relative_to(whole_run)) for path in whole_run.rglob("*") if path.is_file()}
    assert {"config.json", "metrics.jsonl", "model_index.json", "samples/step-5.png", "samples/step-10.png"} <= files
    assert {"model/config.json", "ema/diffusion_pytorch_model.safetensors", "checkpoints/step-5/manifest.json"} <= files
    assert not [path for path in whole_run.rglob(".*")], "something was left half-written"
    config = json.loads((whole_run / "config.json").read_text())
    assert config["alpha_min"] == 0.6 and config["versions"]["torch"] and config["data_fingerprint"]
    assert [line["step"] for line in read_metrics(whole_run)] == [2, 4, 5, 6, 8, 10]  # 5 for its pictures
    assert all(line["loss"] > 0 and len(line["block_norms"]) == 8 for line in read_metrics(whole_run))
    pipeline = Pipeline.from_pretrained(whole_run)
    assert pipeline.config.training["images_seen"] == 40
    assert pipeline.config.class_names == ["cold", "warm"]
    assert len(pipeline(2, 1, num_inference_steps=2).images) == 2


def test_resuming_equals_not_having_stopped_bit_for_bit(train: Callable, whole_run: Path, tmp_path: Path) -> None:
    flags = ["--checkpointing_steps", 5, "--random_flip", "--lr_warmup_steps", 3]
    train(tmp_path / "run", "--max_train_steps", 5, *flags)
    # steps 6 and 7 were logged and then lost, as after a crash
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 0}\n{"step": 7, "lo')
    train(tmp_path / "run", "--max_train_steps", 10, *flags, "--resume_from_checkpoint", "latest")
    assert_same_weights(tmp_path / "run", whole_run)
    assert without_speed(tmp_path / "run") == without_speed(whole_run)  # both have a line of step 5: its end, and its pictures


def test_recomputed_blocks_train_the_same(train: Callable, tmp_path: Path) -> None:
    train(tmp_path / "kept", "--max_train_steps", 3)
    train(tmp_path / "recomputed", "--max_train_steps", 3, "--gradient_checkpointing")
    assert_same_weights(tmp_path / "kept", tmp_path / "recomputed")
    assert without_speed(tmp_path / "kept") == without_speed(tmp_path / "recomputed")


@pytest.mark.slow
def test_a_compiled_network_trains_and_resumes_alike(train: Callable, tmp_path: Path) -> None:
    train(tmp_path / "eager", "--max_train_steps", 6, "--sample_steps", 3)
    flags = ("--max_train_steps", 6, "--sample_steps", 3, "--checkpointing_steps", 3, "--compile")
    train(tmp_path / "compiled", *flags)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0 and not torch._dynamo.utils.counters["graph_break"]
    losses = [[line["loss"] for line in read_metrics(tmp_path / name)] for name in ("eager", "compiled")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    shutil.copytree(tmp_path / "compiled", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/checkpoints/step-6")  # as after a crash
    train(tmp_path / "resumed", *flags, "--resume_from_checkpoint", "latest")
    assert_same_weights(tmp_path / "compiled", tmp_path / "resumed")
    assert without_speed(tmp_path / "compiled") == without_speed(tmp_path / "resumed")
    torch.compiler.reset()


def test_a_copy_with_averaged_weights_goes_as_soon_as_it_is_let_go(tiny_dit: Callable) -> None:
    """What a prepared model holds of itself would keep each copy, on a GPU, until a garbage collection."""
    AcceleratorState._reset_state(True)
    model = tiny_dit()
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    assert "forward" in vars(prepared)
    gc.disable()
    try:
        twin = weakref.ref(averaged(prepared, EMA(model.parameters(), decay=0.9)))
        assert twin() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_a_missing_tracker_is_told(tracker: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.loop_options.get_available_trackers", list)
    with pytest.raises(ValueError, match=f"--report_to {tracker} needs that library; pip install {tracker}, or give --report_to none"):
        check(LoopOptions(output_dir="runs/x", max_train_steps=1, report_to=tracker))


def test_a_missing_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match="--compile needs a C\\+\\+ compiler"):
        check(LoopOptions(output_dir="runs/x", max_train_steps=1, compile=True))


def test_a_long_training_on_a_gpu_is_compiled_unless_it_began_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.compiling.has_what_triton_needs", lambda: True)
    monkeypatch.setattr("training.loop_options.has_what_triton_needs", lambda: True)
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    long = LoopOptions(output_dir=str(tmp_path), max_train_steps=5000)
    assert compiles(long, gpu, whole=True)
    assert not any((compiles(long, cpu, True), compiles(long, gpu, False), compiles(replace(long, max_train_steps=4999), gpu, True)))
    assert compiles(replace(long, max_train_steps=None, max_train_minutes=15), gpu, True)
    assert not any(compiles(replace(long, max_train_steps=None, max_train_minutes=minutes), gpu, True) for minutes in (0, 14.9))
    assert compiles(replace(long, max_train_minutes=10), gpu, True), "it goes on later"
    assert compiles(replace(long, compile=True), cpu, False) and not compiles(replace(long, compile=False), gpu, True)
    short = replace(long, max_train_steps=7, resume_from_checkpoint="latest")
    for begun in (True, False):
        write_json(tmp_path / "config.json", {"compile": begun})
        assert compiles(short, gpu, True) == compiles(replace(short, max_train_steps=5000), gpu, True) == begun
    write_json(tmp_path / "config.json", {"compile": True})
    monkeypatch.setattr("training.loop_options.has_what_triton_needs", lambda: False)
    monkeypatch.setattr("training.loop_options.has_compiler", lambda: False)
    assert not compiles(short, gpu, True) and not compiles(short, cpu, True)


def test_a_log_tells_how_long_it_takes(train: Callable, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, "--max_train_steps", 4, "--logging_steps", 2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 2 and re.match(r"step 2 of 4, \d+\.\d min left: loss ", lines[0])
    assert lines[1].startswith("step 4 of 4: loss ")


def test_the_seed_decides_everything(train: Callable, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(tmp_path / name, "--max_train_steps", 2, "--seed", seed)
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    assert without_speed(tmp_path / "a") != without_speed(tmp_path / "c")


@pytest.mark.slow
def test_two_processes_go_on_with_what_one_began(train: Callable, image_folder: Path, tmp_path: Path) -> None:
    train(tmp_path / "one", "--max_train_steps", 8, "--gradient_accumulation_steps", 2)
    train(tmp_path / "two", "--max_train_steps", 4, "--gradient_accumulation_steps", 2)

    def by_two(run: Path, *flags: object) -> str:
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
        launch += ["--config_file", "training/configs/ddp.yaml", SCRIPT, "--train_data_dir", image_folder, "--output_dir", run, *TINY]
        done = subprocess.run([*map(str, (*launch, *flags))], cwd=ROOT, env=script_environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    told = by_two(tmp_path / "two", "--max_train_steps", 8, "--resume_from_checkpoint", "latest")
    assert told.count("going on with 2 processes: the same images and noise as before") == 1
    odd = ["--train_data_dir", image_folder, "--output_dir", tmp_path / "back", *TINY, "--max_train_steps", 3]  # micro-batches for each
    assert run_together(2, SCRIPT, *odd).returncode == 0
    train(tmp_path / "back", "--max_train_steps", 8, "--gradient_accumulation_steps", 2, "--resume_from_checkpoint", "latest")
    one, two, back = (without_speed(tmp_path / name) for name in ("one", "two", "back"))
    assert len(one) == len(two) == 4
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], rel=1e-5)
    assert [line["loss"] for line in one][-2:] == pytest.approx([line["loss"] for line in back][-2:], rel=1e-5)


def test_processes_that_would_each_train_alone_are_told(
    train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # as under torchrun; accelerate looks at it where it is to compute on CPUs, or has a GPU
    with pytest.raises(SystemExit, match="2"):
        train(tmp_path / "run", "--max_train_steps", 2)
    assert "set ACCELERATE_USE_CPU=True" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("launcher", [[], ["-m", "accelerate.commands.launch", "--cpu"]], ids=["python", "accelerate launch"])
def test_signals_save_and_leave(number: signal.Signals, launcher: list[str], train: Callable, image_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ["--train_data_dir", image_folder, "--output_dir", run, *TINY, "--max_train_steps", 100_000]
    command = [sys.executable, *launcher, SCRIPT, *map(str, flags)]
    # a shell's background jobs ignore Ctrl-C, and so would all that they start
    listening = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen(command, cwd=ROOT, env=script_environment(), **quiet, **listening)
    wait_for(lambda: len(read_metrics(run)) >= 2)
    process.send_signal(number)
    process.wait(60)
    if not launcher:
        assert process.returncode == 0
    wait_for(lambda: (run / "model_index.json").exists())
    step = int(find_checkpoint(run, "latest").name.removeprefix("step-"))
    assert step >= 4
    train(run, "--max_train_steps", step + 2, "--resume_from_checkpoint", "latest")
    assert Pipeline.from_pretrained(run).config.training["steps"] == step + 2


class _ReadsBack(TorchDispatchMode):
    """Numbers that the host reads, for which it would wait for a GPU; of copies it would not see."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        aten = torch.ops.aten
        if operator.overloadpacket in (aten._local_scalar_dense, aten.nonzero, aten.equal, aten.masked_select):
            self.found.append(str(operator))
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("flags", [("--train_batch_size", 4), ("--gradient_accumulation_steps", 2, "--learnable_alpha")])
def test_no_step_reads_a_number_back(flags: tuple, train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads, take_step = [], loop._Training.take_step

    def watched(training: loop._Training, stop: object) -> bool:
        with _ReadsBack() as found:
            taken = take_step(training, stop)
        reads.append(found.found)
        return taken

    monkeypatch.setattr(loop._Training, "take_step", watched)
    train(tmp_path, "--max_train_steps", 3, "--logging_steps", 1, *flags)
    assert reads == [[]] * 3
    with _ReadsBack() as seen:
        torch.ones(1).item()
    assert len(seen.found) == 1


def test_a_run_that_was_compiled_goes_on_where_there_is_no_compiler(
    train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, "--max_train_steps", 1)
    write_json(tmp_path / "config.json", {**read_json(tmp_path / "config.json"), "compile": True})
    monkeypatch.setattr("training.loop_options.has_compiler", lambda: False)
    train(tmp_path, "--max_train_steps", 2, "--resume_from_checkpoint", "latest")
    assert "going on not compiled, other than before: last digits differ" in capsys.readouterr().out


def test_a_signal_amid_a_step_of_many_batches_gives_that_step_up(
    train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--gradient_accumulation_steps", 3, "--max_train_steps", 4, "--logging_steps", 4)
    train(tmp_path / "whole", *flags)
    batches, micro_batch = [], loop._Training._micro_batch

    def signalled(training: loop._Training, accumulated: int) -> object:
        batches.append(accumulated)
        if len(batches) == 3 + 3 + 2:
            signal.raise_signal(signal.SIGTERM)
        return micro_batch(training, accumulated)

    monkeypatch.setattr(loop._Training, "_micro_batch", signalled)
    batches += [0] * 6
    train(tmp_path / "none", *flags)
    assert "left before its first step was done" in capsys.readouterr().out and not checkpoints(tmp_path / "none")
    batches.clear()
    train(tmp_path / "run", *flags)
    assert batches == [0, 1, 2, 0, 1, 2, 0, 1] and [path.name for path in checkpoints(tmp_path / "run")] == ["step-2"]
    train(tmp_path / "run", *flags, "--resume_from_checkpoint", "latest")
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    assert without_speed(tmp_path / "run") == without_speed(tmp_path / "whole")


def test_ctrl_c_ends_compilers_and_leaves_all_the_same(
    train: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(*_: object) -> None:
        if signals:
            signal.raise_signal(signals.pop())
        raise InductorError(RuntimeError("CppCompileError: C++ compile error\n\nCommand: g++ ..."), inspect.currentframe())

    monkeypatch.setattr(loop._Training, "_micro_batch", killed)
    signals = [signal.SIGINT]
    train(tmp_path / "left", "--max_train_steps", 1)
    assert "left before its first step was done" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        train(tmp_path / "failed", "--max_train_steps", 1)
    (told,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert "torch.compile failed" in told and "CppCompileError: C++ compile error" in told and "give --no-compile" in told


def test_minutes_end_a_run(train: Callable, tmp_path: Path) -> None:
    train(tmp_path / "run", "--max_train_minutes", 0.02)
    assert find_checkpoint(tmp_path / "run", "latest")
    assert Pipeline.from_pretrained(tmp_path / "run").config.training["images_seen"] > 0


def test_damaged_checkpoints_are_passed_over(whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    import shutil

    run = shutil.copytree(whole_run, tmp_path / "run")
    weights = run / "checkpoints/step-10/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert find_checkpoint(run, "latest").name == "step-5"
    assert "step-10 is damaged (model.safetensors has changed)" in capsys.readouterr().out
    with pytest.raises(ValueError, match="damaged"):
        find_checkpoint(run, "step-10")
    for manifest in ("", "{", "[]", "{}", '{"files": []}', '{"files": {"model.safetensors": 5}}'):
        (run / "checkpoints/step-10/manifest.json").write_text(manifest)
        assert find_checkpoint(run, "latest").name == "step-5"
    assert capsys.readouterr().out.count("step-10 is damaged (manifest.json is not as it was written)") == 6
    (run / "checkpoints/step-5/optimizer.bin").unlink()
    with pytest.raises(ValueError, match="every checkpoint"):
        find_checkpoint(run, "latest")


class Hostile:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple:
        return self.target.touch, ()


def test_what_a_checkpoint_would_run_is_not_run(
    whole_run: Path, image_folder: Path, tmp_path: Path, run_here: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")  # and taken back after the test
    flags = ["--random_flip", "--lr_warmup_steps", 3, "--checkpointing_steps", 5, "--max_train_steps", 12]
    for file in ("custom_checkpoint_0.pkl", "custom_checkpoint_1.pkl", "optimizer.bin"):
        run = shutil.copytree(whole_run, tmp_path / file)
        path, manifest = run / "checkpoints/step-10" / file, run / "checkpoints/step-10/manifest.json"
        torch.save(Hostile(tmp_path / "touched"), path)
        files = json.loads(manifest.read_text())
        files["files"][file] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        manifest.write_text(json.dumps(files))
        command = [SCRIPT, "--train_data_dir", image_folder, "--output_dir", run, *TINY, *flags, "--resume_from_checkpoint", "latest"]
        code, _, error = run_here(*command)
        assert not (tmp_path / "touched").exists(), file
        assert code == 2 and "holds more than numbers" in error and error.count("\n") == 1, error


def test_nobody_else_trains_in_a_folder(train: Callable, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with locked(tmp_path / "run"):
        with pytest.raises(SystemExit, match="2"):
            train(tmp_path / "run", "--max_train_steps", 1)
        assert (tmp_path / "run").is_dir(), "the folder of the one that works is left alone"
    assert "error: another training works in" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    train(tmp_path / "run", "--max_train_steps", 1)


def test_later_checkpoints_are_given_up_in_words_and_for_something(
    train: Callable, whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run = shutil.copytree(whole_run, tmp_path / "run")
    flags = ["--random_flip", "--lr_warmup_steps", 3, "--checkpointing_steps", 5, "--resume_from_checkpoint", "step-5"]
    with pytest.raises(SystemExit, match="2"):
        train(run, "--max_train_steps", 5, *flags)
    assert "step-5 has --max_train_steps 5 already, and step-10 would be lost" in capsys.readouterr().err
    assert [path.name for path in checkpoints(run)] == ["step-5", "step-10"]
    train(run, "--max_train_steps", 6, *flags)
    assert "going on from step-5; step-10 will be replaced" in capsys.readouterr().out


def test_a_batch_that_cannot_be_held_and_a_run_among_its_pictures_are_refused(
    train: Callable, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit, match="2"):
        train(tmp_path / "run", "--max_train_steps", 1, "--train_batch_size", 10**10)
    error = capsys.readouterr().err
    assert "--train_batch_size 10000000000 would take about" in error and "ask for less" in error
    with pytest.raises(SystemExit, match="2"):
        train(image_folder / "run", "--max_train_steps", 1)
    assert "lies in" in capsys.readouterr().err and not (image_folder / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_end_of_accelerates_launcher_ends_several_processes(number: signal.Signals, image_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", SCRIPT]
    flags = ["--train_data_dir", image_folder, "--output_dir", run, *TINY, "--max_train_steps", 100_000]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen([*launch, *map(str, flags)], cwd=ROOT, env=script_environment(), **quiet)
    wait_for(lambda: len(read_metrics(run)) >= 2)
    others = psutil.Process(process.pid).children(recursive=True)
    assert len(others) >= 3, "torch's launcher and two processes"
    process.send_signal(number)
    process.wait(60)
    assert not psutil.wait_procs(others, timeout=60)[1], "still training"
    assert find_checkpoint(run, "latest")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--alpha_min", "0"], "(0, 1]"),
        (["--alpha_min", "1.5"], "(0, 1]"),
        (["--patch_size", "3"], "not divisible"),
        (["--train_batch_size", "0"], "at least 1"),
        (["--train_data_dir", "nowhere"], "nowhere"),
        (["--dataset_name", "openmoji"], "give one of"),
        (["--max_train_steps", "x"], "give a whole number"),
        (["--max_train_minutes", "nan"], "--max_train_minutes"),
        (["--resume_from_checkpoint", "latest"], "no checkpoint to resume"),
        (["--preset", "nonsense"], "openmoji-plain"),
        (["--size", "XXL"], "XS"),
        (["--depth", "5"], "use an even depth"),
        (["--depth", "257"], "between 1 and 256"),  # what could not be loaded again
        (["--backbone", "unet", "--depth", "4"], "the backbone unet has no depth"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    flags: list[str], message: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from training.train_diffusion import main

    base = ["--train_data_dir", image_folder, "--output_dir", tmp_path / "run", *TINY, "--max_train_steps", 1]
    AcceleratorState._reset_state(True)
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, base), *flags])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and message in error
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten_nor_resumed_as_another(run_here: Callable, whole_run: Path, image_folder: Path) -> None:
    base = [SCRIPT, "--train_data_dir", image_folder, "--output_dir", whole_run, *TINY, "--max_train_steps", 20]
    code, _, errors = run_here(*base)
    assert code == 2
    assert errors.strip().splitlines()[-1].startswith("error: ") and "--resume_from_checkpoint latest" in errors
    code, _, errors = run_here(*base, "--resume_from_checkpoint", "latest", "--seed", 5)
    assert code == 2
    assert "seed was 0 and is 5" in errors


def test_an_end_is_asked_for(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    from training.train_diffusion import main

    base = ["--dataset_name", "openmoji", "--output_dir", str(tmp_path / "run")]
    for flags, message in (([], "needs an end"), (["--max_train_minutes", "1", "--lr_scheduler", "cosine"], "cosine needs")):
        with pytest.raises(SystemExit):
            main([*base, *flags])
        assert message in capsys.readouterr().err


def test_old_checkpoints_go_and_a_resumed_run_keeps_its_own(train: Callable, whole_run: Path, tmp_path: Path) -> None:
    import shutil

    run = shutil.copytree(whole_run, tmp_path / "run")
    weights = run / "checkpoints/step-10/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    flags = ["--random_flip", "--lr_warmup_steps", 3, "--checkpointing_steps", 1, "--checkpoints_total_limit", 2]
    train(run, "--max_train_steps", 8, *flags, "--resume_from_checkpoint", "latest")
    assert [path.name for path in checkpoints(run)] == ["step-7", "step-8"]


def test_a_run_that_died_before_its_first_checkpoint_can_be_started_again(train: Callable, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text("{}")
    train(tmp_path / "run", "--max_train_steps", 1)
    assert Pipeline.from_pretrained(tmp_path / "run").config.training["steps"] == 1


@pytest.mark.slow
def test_a_signal_during_the_last_save_does_not_spoil_it(image_folder: Path, tmp_path: Path) -> None:
    program = f"""
import os, signal
from training import checkpoint, loop
from training.train_diffusion import GROUPS, main
save = checkpoint.save_checkpoint
def interrupted(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    save(*arguments)
checkpoint.save_checkpoint = interrupted
main({["--train_data_dir", str(image_folder), "--output_dir", str(tmp_path / "run"), *TINY, "--max_train_steps", "1"]!r})
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=script_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert Pipeline.from_pretrained(tmp_path / "run").config.training["steps"] == 1


def test_a_preset_can_be_used_on_other_images(image_folder: Path, tmp_path: Path, run_here: Callable) -> None:
    flags = ["--preset", "demo-plain", *TINY, "--max_train_steps", 1, "--train_data_dir", image_folder, "--output_dir", tmp_path / "run"]
    assert run_here(SCRIPT, *flags)[0] == 0
    assert Pipeline.from_pretrained(tmp_path / "run").config.training["data"] == str(image_folder)


def test_values_that_the_paper_advises_against_are_told() -> None:
    assert "keeps it in [0.001, 0.01)" in describe("dit-XS", create_model("dit", "XS", alpha_min=0.8))
    assert "unstable" in describe("dit-XS", create_model("dit", "XS", alpha_min=0.4))
    for alpha_min in (1.0, 0.5):
        assert "\n" not in describe("dit-XS", create_model("dit", "XS", alpha_min=alpha_min))


def test_help_names_defaults_and_presets(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "openmoji-decayed" in text and "(default: 64)" in text


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(run_here: Callable, image_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    flags = ["--max_train_steps", 50, "--checkpointing_steps", 1, "--learning_rate", "1e30", "--max_grad_norm", 0]
    code, _, errors = run_here(SCRIPT, "--train_data_dir", image_folder, "--output_dir", run, *TINY, *flags)
    assert code == 1 and "not finite" in errors
    state = load_file(find_checkpoint(run, "latest") / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in state.values())


def test_a_step_that_is_not_finite_can_be_left_out(train: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls, objective = iter(range(100)), FlowMatching.__call__

    def broken_at(*bad: int) -> Callable:
        def call(*arguments: object) -> torch.Tensor:
            return objective(*arguments) * (torch.nan if next(calls) in bad else 1)

        return call

    monkeypatch.setattr(FlowMatching, "__call__", broken_at(2))
    train(tmp_path / "skipped", "--max_train_steps", 4, "--skip_nonfinite", "--gradient_accumulation_steps", 2)  # the first half of step 1
    assert [math.isfinite(line["loss"]) for line in read_metrics(tmp_path / "skipped")] == [True, True]
    weights = load_file(tmp_path / "skipped/model/diffusion_pytorch_model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
    monkeypatch.setattr(FlowMatching, "__call__", broken_at(*range(100)))
    with pytest.raises(SystemExit, match="1"):
        train(tmp_path / "ended", "--max_train_steps", 50, "--skip_nonfinite", "--checkpointing_steps", 3)
    assert len(read_metrics(tmp_path / "ended")) == 9, "it did not end after 20 steps"
    told = read_json(tmp_path / "ended" / BROKE)
    assert "in 20 steps in a row, up to step 20" in told["why"] and told["images_seen"] == 20 * 4


ONE_EXPLODES = """
import os, runpy, sys
import training.loop

def explode(*arguments, tell=training.loop.feature_statistics):
    return tell(*arguments) | ({"block_norms": [float("nan")] * 8} if os.environ["RANK"] == "1" else {})

training.loop.feature_statistics = explode
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_features_that_explode_in_another_process_end_all(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(ONE_EXPLODES)
    flags = ["--train_data_dir", image_folder, "--output_dir", tmp_path / "run", *TINY, "--max_train_steps", 4, "--probe_every", 2]
    done = run_together(2, tmp_path / "broken.py", SCRIPT, *flags)
    assert done.returncode and "error: after step 2 a block puts out numbers of size nan" in done.stderr, done.stderr
    assert "the features explode" in read_json(tmp_path / "run" / BROKE)["why"] and len(read_metrics(tmp_path / "run")) == 1


def test_a_run_that_goes_on_with_other_code_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def at(revision: str | None) -> None:
        monkeypatch.setattr("training.checkpoint.run_metadata", lambda: {"versions": {"torch": "2"}, "git_revision": revision})

    config = {"seed": 0, "versions": {"torch": "2"}, "git_revision": "a"}
    for step, revision in ((1, "a"), (2, "b"), (3, "b"), (4, "a"), (5, None)):
        at(revision)
        config["continued"] = continued(config, step)
    assert [(each["step"], each["git_revision"]) for each in config["continued"]] == [(2, "b"), (4, "a"), (5, None)]
    assert revisions(config) == ["a", "b", "a", "unknown"] and revisions({}) == ["unknown"]
    at("c")
    assert [each["git_revision"] for each in continued(config, 4)] == ["b", "c"], "what was trained after step 4 is given up"


def test_a_run_that_goes_on_on_another_machine_says_so() -> None:
    config = {key: value for key, value in run_metadata().items() if key != "cpu"}
    assert continued(config, 1) == [], "an older one did not tell"
    assert continued({**config, "cpu": cpu_name()}, 1) == [] and cpu_name()
    assert continued({**config, "cpu": "another"}, 1) == [{"step": 1, **run_metadata()}]


def test_config_tells_what_a_run_went_on_with(train: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def went_on(*flags: object) -> dict:
        train(tmp_path, *flags, "--resume_from_checkpoint", "latest")
        return read_json(tmp_path / "config.json")

    train(tmp_path, "--max_train_steps", 1)
    monkeypatch.setattr("training.checkpoint.run_metadata", lambda: {"git_revision": "later"})
    assert "continued" not in went_on("--max_train_steps", 1), "no step was taken"
    config = went_on("--max_train_steps", 2)
    assert config["continued"] == [{"step": 1, "git_revision": "later"}] and config["git_revision"] != "later"
    assert config["max_train_steps"] == 2
    assert went_on("--max_train_minutes", 0.0001)["max_train_steps"] == 2, "where none is given the last one stays"


def test_every_image_is_seen_once_an_epoch() -> None:
    order = Order(10, seed=3)
    seen = [order.indices(4 * i, 4).tolist() for i in range(5)]
    flat = [index for part in seen for index in part]
    assert sorted(flat[:10]) == sorted(flat[10:]) == list(range(10))
    assert flat[:10] != flat[10:]
    assert Order(10, seed=3).indices(8, 4).tolist() == seen[2]


def test_learning_rates() -> None:
    options = LoopOptions(learning_rate=1.0, lr_warmup_steps=4, max_train_steps=104, lr_scheduler="cosine")
    assert [learning_rate(options, step) for step in range(4)] == [0.25, 0.5, 0.75, 1]
    assert learning_rate(options, 54) == pytest.approx(0.5)
    assert learning_rate(options, 104) == pytest.approx(0)


def test_ema_is_the_recursion() -> None:
    parameter, expected = torch.nn.Parameter(torch.zeros(3)), 0.0
    ema = EMA([parameter], decay=0.5)
    for step in range(1, 40):
        parameter.data += 1
        ema.update([parameter], step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    torch.testing.assert_close(ema.averages[0], torch.full((3,), expected))


def test_flow_matching_asks_for_data_minus_noise(tiny_dit: Callable) -> None:
    batch = {"images": torch.randn(64, 3, 16, 16), "labels": torch.zeros(64, dtype=torch.long)}
    (x, t, labels), target, _ = FlowMatching(3, class_dropout=0.25).inputs(batch, torch.Generator().manual_seed(0))
    noise = batch["images"] - target
    t = t.view(-1, 1, 1, 1)
    torch.testing.assert_close(x, t * batch["images"] + (1 - t) * noise, atol=1e-5, rtol=1e-5)
    assert 0 < (labels == 3).sum() < 40 and set(labels.tolist()) == {0, 3}
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    loss = FlowMatching(3)(lambda x, t, labels: torch.zeros_like(x), batch, torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(2, rel=0.02)  # E (data - noise)^2 for two unit normals


def test_a_gpu_is_left_alone_where_cpus_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: True)
    monkeypatch.setattr("models.precision.cpu_has_bf16", lambda: False)
    assert uses_gpu() and precision("auto") == "bf16"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert not uses_gpu() and precision("auto") == "no" and precision("bf16") == "bf16"


def test_the_accelerated_model_runs_in_the_wanted_precision(tiny_dit: Callable) -> None:
    """The loop relies on prepare() to put the forward pass under autocast."""
    AcceleratorState._reset_state(True)
    model = Accelerator(cpu=True, mixed_precision="bf16").prepare(tiny_dit())
    seen = []
    model.blocks[0].attn.register_forward_hook(lambda module, arguments, output: seen.append(output.dtype))
    assert model(torch.randn(1, 3, 16, 16), torch.rand(1)).dtype == torch.float32
    assert seen == [torch.bfloat16]
    AcceleratorState._reset_state(True)


def test_a_run_may_begin_with_the_weights_of_another(train: Callable, whole_run: Path, tmp_path: Path) -> None:
    train(tmp_path / "run", "--init_from", whole_run, "--max_train_steps", 1, "--learning_rate", 0)
    before, after = (Pipeline.from_pretrained(path) for path in (whole_run, tmp_path / "run"))
    assert all(torch.equal(a, b) for a, b in zip(before.model.parameters(), after.model.parameters(), strict=True))
    assert after.config.training["images_seen"] == before.config.training["images_seen"] + 4


@pytest.mark.parametrize(
    "flags",
    [
        "--backbone uvit --objective ddpm --prediction_type v_prediction --snr_gamma 5 --shortcut_schedule cosine --depth 2",
        "--backbone unet --size XS --learnable_alpha --path gvp --time_distribution logit-normal --shortcut_placement attention",
        "--backbone dit --objective ddpm --beta_schedule squaredcos_cap_v2 --no-long_skips --no-zero_init",
    ],
)
def test_every_backbone_and_objective_trains_and_samples(flags: str, image_folder: Path, run_here: Callable, tmp_path: Path) -> None:
    base, patch = TINY[:2] + TINY[6:], [] if "unet" in flags else TINY[2:4]  # without alpha_min
    command = [SCRIPT, "--train_data_dir", image_folder, "--output_dir", tmp_path, *base, *patch, *flags.split()]
    command += ["--train_batch_size", 2, "--alpha_eff", "0.05", "--max_train_steps", 2, "--sample_steps", 2]
    assert run_here(*command)[0] == 0
    pipeline = Pipeline.from_pretrained(tmp_path)
    images = pipeline(2, 0, num_inference_steps=2, output_type="pt").images
    assert images.shape == (2, 3, 8, 8) and images.isfinite().all()
    assert effective_alpha(pipeline.model.alphas) == pytest.approx(0.05, rel=0.1)
    assert pipeline.is_flow == ("ddpm" not in flags) and pipeline.config.path == ("gvp" if "gvp" in flags else "linear")
    assert ("--depth 2" in flags) == (getattr(pipeline.model.config, "depth", None) == 2)
    assert getattr(pipeline.model.config, "time_scale", None) == (1 if "uvit" in flags else 1000 if "unet" in flags else None)
    assert (tmp_path / "samples" / "step-2.png").is_file()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("--objective ddpm --path gvp", "the objective ddpm has no --path"),
        ("--prediction_type sample", "the objective flow has no --prediction_type"),
        ("--backbone unet --size XS --no-long_skips", "has no long_skips"),
        ("--alpha_min 0.5 --alpha_eff 0.01", "not both"),
        ("--shortcut_schedule sqrt-half --alpha_min 0.5", "leave it away"),
        ("--objective ddpm --snr_gamma 0", "above 0"),
    ],
)
def test_options_that_contradict_each_other_are_told(
    flags: str, told: str, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = ["--train_data_dir", str(image_folder), "--output_dir", str(tmp_path / "run"), "--max_train_steps", "1", *flags.split()]
    with pytest.raises(SystemExit, match="2"):
        main(command)
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_that_began_with_other_weights_resumes_without_them(train: Callable, whole_run: Path, tmp_path: Path) -> None:
    source = shutil.copytree(whole_run, tmp_path / "source")
    flags = ("--init_from", source, "--checkpointing_steps", 1)
    train(tmp_path / "run", *flags, "--max_train_steps", 1)
    seen = Pipeline.from_pretrained(tmp_path / "run").config.training["images_seen"]
    shutil.rmtree(source)
    train(tmp_path / "run", *flags, "--max_train_steps", 2, "--resume_from_checkpoint", "latest")
    assert Pipeline.from_pretrained(tmp_path / "run").config.training["images_seen"] == seen + 4


def test_another_time_is_no_beginning(whole_run: Path, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["--train_data_dir", image_folder, "--output_dir", tmp_path / "run", *TINY, "--max_train_steps", 1, "--init_from", whole_run]
    for flags, told in ((["--objective", "ddpm"], "would train a DDPM"), (["--path", "gvp"], "a flow on the gvp path")):
        with pytest.raises(SystemExit, match="2"):
            main([*map(str, command), *flags])
        assert told in capsys.readouterr().err


def test_weights_that_would_mean_something_else_are_no_beginning(
    train: Callable, tiny_dit: Callable, image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Their shapes fit."""
    other = tiny_dit(image_size=8, depth=8, dim=192, num_heads=6, num_classes=2)
    Pipeline(other, FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path / "heads")
    train(tmp_path / "noise", "--objective", "ddpm", "--prediction_type", "epsilon", "--max_train_steps", 1)
    for source, flags, told in (
        ("heads", [], "num_heads was 6 and is 3"),
        (
            "noise",
            ["--objective", "ddpm", "--prediction_type", "v_prediction"],
            "prediction_type epsilon, and this would train v_prediction",
        ),
    ):
        command = ["--train_data_dir", image_folder, "--output_dir", tmp_path / "run", *TINY, *flags, "--max_train_steps", 1]
        with pytest.raises(SystemExit, match="2"):
            main([*map(str, command), "--init_from", str(tmp_path / source)])
        assert told in capsys.readouterr().err


def test_other_shortcuts_than_those_of_the_beginning_are_told(
    train: Callable, whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    train(tmp_path / "same", "--init_from", whole_run, "--max_train_steps", 1)
    assert "was trained with" not in capsys.readouterr().out
    train(tmp_path / "other", "--init_from", whole_run, "--max_train_steps", 1, "--alpha_min", 1)
    assert "was trained with alpha 1 -> 0.6, and this trains plain shortcuts" in capsys.readouterr().out


def test_published_weights_with_a_variance_are_a_beginning(train: Callable, tiny_dit: Callable, tmp_path: Path) -> None:
    published = tiny_dit(image_size=8, depth=8, dim=192, num_heads=3, num_classes=2, long_skips=False, learn_sigma=True)
    Pipeline(published, FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path / "published")
    x, t, labels = torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 1])
    expected = published(x, t, labels)[:, :3]
    flags = ("--init_from", tmp_path / "published", "--no-long_skips", "--alpha_min", 1, "--learning_rate", 0, "--max_train_steps", 1)
    train(tmp_path / "run", *flags)
    found = Pipeline.from_pretrained(tmp_path / "run").model
    assert not found.config.learn_sigma
    torch.testing.assert_close(found(x, t, labels), expected)


def test_a_flag_that_says_it_otherwise_wins_over_the_preset() -> None:
    flags = ["--preset", "demo-decayed", "--output_dir", "x"]
    schedules = (("sqrt-half", 1.0), ("cosine", 0.5), ("constant", 0.5))
    for more, alpha_min in (
        ([], 0.5),
        (["--alpha_eff", "3e-3"], 1.0),
        *(([f"--shortcut_schedule={name}"], alpha_min) for name, alpha_min in schedules),
    ):
        _, (_, model, shortcuts, *_) = parse("", GROUPS, PRESETS, [*flags, *more])
        assert (shortcuts.alpha_min, model.patch_size) == (alpha_min, 4)
    _, (_, model, *_) = parse("", GROUPS, PRESETS, [*flags, "--backbone", "unet"])
    assert model.patch_size is None


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_min_snr_weighs_as_it_would_weigh_the_data(prediction_type: str) -> None:
    """The same network, asked for anything, has the loss min(SNR, gamma) * ||data - its data||^2."""
    objective = DDPM(prediction_type=prediction_type, snr_gamma=5)
    data = torch.randn(16, 3, 4, 4)
    x, timesteps, target, weights = objective.draw(data, torch.Generator().manual_seed(0))
    alpha_bar = objective.noising.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    prediction = target + 0.01 * torch.randn_like(target)
    off = data_from_prediction(x, prediction, alpha_bar, prediction_type) - data_from_prediction(x, target, alpha_bar, prediction_type)
    snr = (alpha_bar / (1 - alpha_bar)).flatten()
    expected = snr.clamp(max=5) * off.square().mean((1, 2, 3))
    torch.testing.assert_close(weights * (prediction - target).square().mean((1, 2, 3)), expected, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("beta_schedule", BETA_SCHEDULES)
def test_samplers_take_the_noise_of_the_training(beta_schedule: str) -> None:
    objective = DDPM(beta_schedule=beta_schedule, prediction_type="v_prediction", clip=False)
    assert torch.equal(objective.scheduler.alphas_cumprod, objective.noising.alphas_cumprod)
    assert objective.scheduler.config.prediction_type == "v_prediction" and not objective.scheduler.config.clip_sample
    with pytest.raises(ValueError, match="take --prediction_type v_prediction"):
        DDPM(beta_schedule="squaredcos_cap_v2", clip=False)


def test_logit_normal_times() -> None:
    t = TIME_DISTRIBUTIONS["logit-normal"](10_000, generator=torch.Generator().manual_seed(0))
    assert abs(t.logit().mean()) < 0.03 and abs(t.logit().std() - 1) < 0.03


def test_latents_train_sample_and_are_published(train: Callable, run_script: Callable, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(4, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                        latent_channels=4, norm_num_groups=2)  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    train(tmp_path / "run", "--vae", tmp_path / "vae", "--resolution", 16, "--random_flip", "--sample_steps", 2, "--max_train_steps", 2)
    trained = Pipeline.from_pretrained(tmp_path / "run")
    assert not has_changed(trained, training_data(trained, 16)[0]), "the images are looked at again, not their latents"
    done = run_script("-m", "training.publish", tmp_path / "run", tmp_path / "published")
    assert done.returncode == 0, done.stderr
    for folder in ("run", "published"):
        pipeline = Pipeline.from_pretrained(tmp_path / folder)
        assert pipeline.latent_shape == (4, 8, 8)
        assert pipeline(2, 0, num_inference_steps=2, output_type="np").images.shape == (2, 16, 16, 3)


def test_weights_that_do_not_fit_are_told(whole_run: Path, image_folder: Path, run_here: Callable, tmp_path: Path) -> None:
    flags = ["--train_data_dir", image_folder, "--output_dir", tmp_path / "run", *TINY, "--max_train_steps", 1]
    code, _, errors = run_here(SCRIPT, *flags, "--init_from", whole_run, "--size", "S")
    assert code == 2
    assert "does not fit" in errors and errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_what_may_differ_on_resuming_are_options() -> None:
    names = {field.name for group in (*GROUPS, *train_mae.GROUPS) for field in fields(group)}
    assert {*names, "preset"} >= FREE_ON_RESUME
