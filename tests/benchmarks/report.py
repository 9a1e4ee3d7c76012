"""Results as a page of Markdown."""

from collections.abc import Mapping
from typing import Any

INTRODUCTION = (
    "Written by `python -m tests.benchmarks NAME ... --json FILE`: both sides in one run, in turn, the order swapped from pair to pair.",
    "*Times as fast* is the median over pairs of their time / ours, with its 95 % interval (order statistics); processor time is what to",
    "look at where other work was on the machine. A goal that is not reached stands here as it is.",
)
TRIED = (
    "`torch.compile` on 2 CPU cores: steps take 10 % less, after minutes of compiling; an option (`--compile`), off unless asked for.",
    "Channels-last for the U-Net on a CPU, bf16: 1.02 of the time (S, 32 px, 8 images); left as it was.",
    "One kernel forward and one backward for the decayed add: no measurable gain over the plain addition with a factor.",
    "Averaging the weights every k steps: the average of DiT-XS costs about 1 % of a step on 2 cores; it is taken in every step.",
    "Bytes to floats in one pass, in six ways: none faster than the four passes, which wait for the same fresh memory.",
    "Attention in bf16 on CPUs: torch's backward pass takes 2.5 times as long as in fp32, so attention runs in fp32 (13 % of a step).",
)


def page(cases: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of ratios, the limits of the training steps, and what was tried.

    Args:
        cases: name -> what `python -m tests.benchmarks` found of it.
    """
    lines = ["# Speed", "", *INTRODUCTION, "", "| case | what | times as fast | of processor time | goal | pairs |", "|---" * 6 + "|"]
    for name, found in cases.items():
        interval = found.get("ratio_interval_95")
        ratio = f"{1 / found['ratio_median']:.3g}" + (f" [{1 / interval[1]:.3g}, {1 / interval[0]:.3g}]" if interval else "")
        goal = f"{found['goal']:.3g}" if found.get("goal") else ""
        lines.append(f"| {name} | {found['about']} | {ratio} | {1 / found['processor_ratio_median']:.3g} | {goal} | {found['pairs']} |")
    limited = {name: found for name, found in cases.items() if "limits" in found}
    if limited:
        head = "| case | ours, s | products at least, s | share | memory traffic at least, s |"
        lines += ["", "How far a training step is from the limits of the machine:", "", head, "|---" * 5 + "|"]
    for name, found in limited.items():
        limits, ours = found["limits"], found["ours_s_median"]
        share = f"{limits['products_s'] / ours:.0%}"
        lines.append(f"| {name} | {ours:.3f} | {limits['products_s']:.3f} | {share} | {limits['traffic_s']:.3f} |")
    lines += ["", "Tried, and what came of it:", "", *(f"- {line}" for line in TRIED), "", "Machines:", ""]
    for name, found in cases.items():
        told = found["machine"]
        versions = ", ".join(f"{library} {version}" for library, version in told["versions"].items())
        lines.append(f"- {name}: {told['device']}, {told['torch_threads']} threads, {told['precision']}; {versions}; {told['date']}")
    return "\n".join(lines) + "\n"
