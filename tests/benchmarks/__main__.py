"""Time our work beside an opponent's, in one process, in turn: python -m tests.benchmarks [NAME ...] --json OUT"""

import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import psutil
import torch

from models import create_model
from models.files import Parser, one_line_errors, write_json
from models.precision import autocast, precision
from training.objectives import FlowMatching

Work = Callable[[], object]
BATCH = 32


def training_step(alpha_min: float) -> Work:
    """A training step of DiT-XS at 32 px, patch 4, batch 32, in the precision that pays here."""
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = create_model("dit", "XS", image_size=32, patch_size=4, num_classes=9, alpha_min=alpha_min).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    batch = {"images": torch.rand(BATCH, 3, 32, 32, device=device) * 2 - 1, "labels": torch.randint(9, (BATCH,), device=device)}
    generator, objective = torch.Generator(device).manual_seed(0), FlowMatching(9)

    def step() -> None:
        with autocast(device, precision("auto")):
            loss, _ = objective(model, batch, generator)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    return step


def alpha() -> tuple[str, Work, Work]:
    """What fading costs: a decayed training step against a plain one."""
    return "decayed step / plain step", training_step(0.5), training_step(1.0)


def control() -> tuple[str, Work, Work]:
    """The same work on both sides: how far from 1 a ratio may lie by chance or by the order of allocation."""
    return "plain step / plain step", training_step(1.0), training_step(1.0)


CASES: dict[str, Callable[[], tuple[str, Work, Work]]] = {"alpha": alpha, "control": control}


def measure(ours: Work, theirs: Work, pairs: int) -> dict[str, Any]:
    """Seconds of both in turn, the order swapped from pair to pair, and the ratios ours / theirs pair by pair."""
    for work in (ours, theirs, ours, theirs):
        work()
    seconds: tuple[list[float], list[float]] = [], []
    for i in range(pairs):
        for which in (0, 1) if i % 2 else (1, 0):
            began = time.perf_counter()
            (ours, theirs)[which]()
            seconds[which].append(time.perf_counter() - began)
    ratios = sorted(a / b for a, b in zip(*seconds, strict=True))
    # a 95 % interval of the median from order statistics (binomial, normal approximation)
    reach = 0.98 * len(ratios) ** 0.5
    low, high = ratios[max(0, int(len(ratios) / 2 - reach))], ratios[min(len(ratios) - 1, int(len(ratios) / 2 + reach))]
    return {
        "ratio_median": statistics.median(ratios),
        "ratio_interval_95": [low, high],
        "ours_s_median": statistics.median(seconds[0]),
        "theirs_s_median": statistics.median(seconds[1]),
        "pairs": pairs,
    }


def peak_of(work: Work) -> int:
    """Bytes that the work holds at its peak, beyond what was held before: the tensors that autograd allocates."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    held = peak = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def main() -> None:
    """The command line."""
    flags = Parser(prog="python -m tests.benchmarks", description=__doc__)
    flags.add_argument("cases", nargs="*", metavar="NAME", help=f"{', '.join(CASES)} (default: all)")
    flags.add_argument("--pairs", type=int, default=40, help="timed runs of each side (default: %(default)s)")
    flags.add_argument("--json", help="write the results to this file")
    parsed = flags.parse_args()
    with one_line_errors():
        if unknown := set(parsed.cases) - set(CASES):
            raise ValueError(f"there is no benchmark {unknown.pop()!r}; choose from {', '.join(CASES)}")
        results = {}
        for name in parsed.cases or CASES:
            about, ours, theirs = CASES[name]()
            found = measure(ours, theirs, parsed.pairs)
            if not torch.cuda.is_available():
                found |= {"ours_peak_bytes": peak_of(ours), "theirs_peak_bytes": peak_of(theirs)}
            results[name] = {"about": about, **found}
            low, high = found["ratio_interval_95"]
            memory = f", peak memory {found['ours_peak_bytes'] / found['theirs_peak_bytes']:.3f}" if "ours_peak_bytes" in found else ""
            print(f"{name:8} {about}: {found['ratio_median']:.3f} [{low:.3f}, {high:.3f}]{memory}", flush=True)
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{psutil.cpu_count()} CPU threads, {platform.machine()}"
        machine = {"device": device, "precision": precision("auto"), "versions": {"torch": version("torch")}}
        if parsed.json:
            write_json(parsed.json, {"machine": machine, "cases": results})


if __name__ == "__main__":
    main()
