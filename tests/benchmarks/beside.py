"""A training and a sampling on the same cores, as the page has them: processes of their own, which wait until they are asked."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch

from app.__main__ import parser
from app.job_process import give_way
from models.pipeline import Pipeline
from models.precision import autocast, precision
from tests.benchmarks.inputs import Inputs
from tests.benchmarks.measure import Case, Work
from tests.benchmarks.steps import step_of

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "models" / "pretrained" / "openmoji-decayed"
STEPS, SAMPLINGS = 12, 8  # which take equally long, about 2.5 s alone


def beside(inputs: Inputs) -> Case:
    """Both at once, until the slower one is done."""
    about = f"{STEPS} training steps of DiT-XS beside {SAMPLINGS} x 8 images sampled, on the same cores"
    sides = [inputs.keep(_workers(gives_way)) for gives_way in (True, False)]
    return Case(f"{about}: the training gives way, as the page's do / both alike", *sides, pairs=8, warm_ups=1, of_torch=False)


@contextmanager
def _workers(gives_way: bool) -> Iterator[Work]:
    """Both processes; the work is to ask both, and to wait for both."""
    start = partial(subprocess.Popen, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    with ExitStack() as stack:
        workers = [stack.enter_context(start([sys.executable, "-m", __name__, kind])) for kind in ("training", "sampling")]
        if gives_way:
            give_way(workers[0].pid, nice=parser().get_default("nice"))

        def answered() -> None:
            for worker in workers:
                if not (worker.stdout and worker.stdout.readline()):
                    raise RuntimeError(f"{worker.args} has ended")

        def work() -> None:
            for worker in workers:
                print(file=worker.stdin, flush=True)
            answered()

        answered()
        yield work
        for worker in workers:
            worker.communicate()


def _training() -> Work:
    _, step = step_of("dit", 0.5)
    return lambda: [step() for _ in range(STEPS)]


def _sampling() -> Work:
    pipeline = Pipeline.from_pretrained(SHIPPED)
    pipeline.set_progress_bar_config(disable=True)

    def work() -> None:
        with autocast(torch.device("cpu"), precision("auto")):
            for seed in range(SAMPLINGS):
                pipeline(8, class_labels=0, seed=seed, num_inference_steps=8, sampler="dpm++", guidance_scale=2.0)

    return work


def main(kind: str) -> None:
    """Of a worker."""
    work = {"training": _training, "sampling": _sampling}[kind]()
    print("ready", flush=True)
    for _ in sys.stdin:
        work()
        print("done", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
