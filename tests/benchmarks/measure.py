"""How it is compared: in turn, pair by pair; and how far from the limits of the hardware."""

import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import psutil
import torch

from models.precision import cpu_name, precision

Work = Callable[[], object]

DATA_SHEETS = {"H100": 989.4e12, "H200": 989.4e12, "A100": 312e12}  # of a GPU's data sheet, bf16 without sparsity, operations a second


@dataclass(frozen=True)
class Case:
    """What is compared.

    Attributes:
        about: in words.
        peer: the checkout that theirs is of, where it is of one.
        ours, theirs: the work of both sides.
        goal: how many times as fast ours is to be.
        parameters: of a training step those of the network, so that its limits can be told.
        pairs: timed runs of each, unless asked otherwise.
        warm_ups: runs of each that are not timed.
        of_torch: the work is torch's in this process, so that its memory can be told.
        theirs_times: how often their run makes the work of ours; above 1 where it is one of so many equal parts.
        notes: what belongs to the ratio, in words for the page.
        figures: the same in numbers, for the JSON.
        valid: the sides do what they are compared for; else no goal is reached.
    """

    about: str
    ours: Work
    theirs: Work
    peer: str = ""
    goal: float | None = None
    parameters: int = 0
    pairs: int = 40
    warm_ups: int = 2
    of_torch: bool = True
    theirs_times: int = 1
    notes: tuple[str, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    valid: bool = True

    def row(self, name: str, label: str = "") -> str:
        """What it is called among the results: a peer has a row of its own, and so has what the user labels."""
        more = ", ".join(filter(None, (self.peer, label)))
        return f"{name} ({more})" if more else name


def measure(case: Case, pairs: int) -> dict[str, Any]:
    """Seconds of both in turn, the order swapped from pair to pair, and the ratios ours / theirs pair by pair.

    Elapsed ones, and those that the processors worked: other work on the machine moves the former more.
    """
    for work in (case.ours, case.theirs) * case.warm_ups:
        work()
    finish()
    seconds: tuple[list[float], list[float]] = [], []
    worked: tuple[list[float], list[float]] = [], []
    for i in range(pairs):
        for which in (0, 1) if i % 2 else (1, 0):
            began, busy = time.perf_counter(), processor_s()
            (case.ours, case.theirs)[which]()
            finish()
            times = (1, case.theirs_times)[which]
            seconds[which].append(times * (time.perf_counter() - began))
            worked[which].append(times * (processor_s() - busy))
    ratios = sorted(a / b for a, b in zip(*seconds, strict=True))
    # a 95 % interval of the median from order statistics (binomial, normal approximation); of fewer than six there is none
    reach = 0.98 * len(ratios) ** 0.5
    ends = max(0, int(len(ratios) / 2 - reach)), min(len(ratios) - 1, int(len(ratios) / 2 + reach))
    return {
        "times_as_fast": 1 / statistics.median(ratios),  # what a goal is of; the ratios are ours / theirs
        "ratio_median": statistics.median(ratios),
        "ratio_interval_95": [ratios[end] for end in ends] if len(ratios) >= 6 else None,
        "ours_s_median": statistics.median(seconds[0]),
        "theirs_s_median": statistics.median(seconds[1]),
        "processor_ratio_median": statistics.median(a / b for a, b in zip(*worked, strict=True)),
        "ours_processor_s_median": statistics.median(worked[0]),
        "theirs_processor_s_median": statistics.median(worked[1]),
        "pairs": pairs,
    }


def finish() -> None:
    """Wait until what was sent to a GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def processor_s() -> float:
    """Seconds that processors worked for this process, for those that it waited for, and for its workers."""
    times = os.times()
    workers = [worker.cpu_times() for worker in psutil.Process().children(recursive=True)]
    return times.user + times.system + times.children_user + times.children_system + sum(each.user + each.system for each in workers)


def peak_of(work: Work) -> int:
    """Bytes that the work holds at its peak, beyond what was held before: the tensors that autograd allocates."""
    from torch.profiler import ProfilerActivity, profile

    if torch.cuda.is_available():
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - held
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    held = peak = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def limits_of(case: Case) -> dict[str, float]:
    """Of a training step: seconds that its products and its memory traffic take at least, at the rates that this machine shows.

    Products: those of `case.ours`, counted, at the rate of one large product. Traffic: weights, gradients, both moments of AdamW and
    the average, float32, each read and written once, at the rate of a large copy. What else a step does comes on top.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        case.ours()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    edge = 2048 if device.type == "cpu" else 8192
    matrix = torch.randn(edge, edge, device=device, dtype=torch.bfloat16 if precision("auto") == "bf16" else torch.float32)
    memory = torch.empty(2**26, device=device)  # 256 MiB

    def multiply() -> None:
        matrix @ matrix

    flops_per_s = 2 * edge**3 / quickest(multiply)
    bytes_per_s = 2 * memory.nbytes / quickest(lambda: memory.add_(1))
    return {
        "flops": counter.get_total_flops(),
        "flops_per_s": flops_per_s,
        "products_s": counter.get_total_flops() / flops_per_s,
        "data_sheet_flops_per_s": next((rate for name, rate in DATA_SHEETS.items() if name in machine()["device"]), None),
        "bytes_per_s": bytes_per_s,
        "traffic_s": 5 * 2 * 4 * case.parameters / bytes_per_s,
    }


def quickest(work: Work, times: int = 10) -> float:
    """Least seconds of several runs."""
    found = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        finish()
        found.append(time.perf_counter() - began)
    return min(found)


def machine() -> dict[str, Any]:
    """What a ratio depends on beside the work."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{psutil.cpu_count()} threads of {cpu_name()}"
    return {
        "device": device,
        "torch_threads": torch.get_num_threads(),
        "precision": precision("auto"),
        "versions": {name: version(name) for name in ("torch", "timm", "diffusers", "scikit-learn", "torch-fidelity")},
        "date": time.strftime("%Y-%m-%d"),
    }
