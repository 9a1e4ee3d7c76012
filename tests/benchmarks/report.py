"""Results as a page of Markdown."""

from collections.abc import Mapping
from typing import Any

INTRODUCTION = (
    "Written by `python -m tests.benchmarks NAME ... --json FILE`: both sides in one run, in turn, the order swapped from pair to pair.",
    "*Times as fast* is the median over pairs of their time / ours, with its 95 % interval (order statistics; fewer than six pairs have",
    "none); processor time is what to look at where other work was on the machine. *Of memory* is our peak / theirs, of the tensors that",
    "autograd allocates. A goal below 1 is how much longer ours may take: 0.952 is 5 %, 0.995 is 0.5 %, 0.769 is 30 %. A goal that is not",
    "reached stands here as it is.",
)
LIMITS = (
    "How far a training step is from the limits of the machine: its matrix products at the rate of one large product, and its weights,",
    "gradients and moments read and written once at the rate of a large copy. *Of the data sheet* is the model's operations a second",
    "as a share of those that a GPU's maker names for dense bf16 (model FLOP utilisation).",
)


def page(cases: Mapping[str, Mapping[str, Any]], tried: str = "") -> str:
    """A table of ratios, what belongs to them, the limits of the training steps, and what was tried.

    Args:
        cases: name -> what `python -m tests.benchmarks` found of it.
        tried: Markdown, written by hand: what was tried, and what came of it.
    """
    head = "| case | what | times as fast | of processor time | of memory | goal | reached | pairs |"
    lines = ["# Speed", "", *INTRODUCTION, "", head, "|---" * 8 + "|"]
    for name, found in cases.items():
        goal = f"{found['goal']:.3g}" if found.get("goal") else ""
        memory = f"{found['ours_peak_bytes'] / found['theirs_peak_bytes']:.3f}" if "ours_peak_bytes" in found else ""
        cells = [
            name,
            found["about"],
            times_as_fast(found),
            f"{1 / found['processor_ratio_median']:.3g}",
            memory,
            goal,
            reached(found),
            str(found["pairs"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    for name, found in cases.items():
        if found.get("notes"):
            lines += ["", f"{name}:", "", *(f"- {note}" for note in found["notes"])]
    limited = {name: found for name, found in cases.items() if "limits" in found}
    if limited:
        head = "| case | ours, s | products at least, s | share | memory traffic at least, s | times the floor | of the data sheet |"
        lines += ["", *LIMITS, "", head, "|---" * 7 + "|"]
    for name, found in limited.items():
        limits, ours = found["limits"], found["ours_s_median"]
        products, traffic = limits["products_s"], limits["traffic_s"]
        sheet = limits.get("data_sheet_flops_per_s")
        cells = [name, f"{ours:.3f}", f"{products:.3f}", f"{products / ours:.0%}", f"{traffic:.3f}", f"{ours / (products + traffic):.2f}"]
        cells.append(f"{limits['flops'] / ours / sheet:.0%}" if sheet else "")
        lines.append(f"| {' | '.join(cells)} |")
    if tried:
        lines += ["", "Tried, and what came of it:", "", tried.strip()]
    lines += ["", "Machines:", ""]
    for machine, names in machines(cases).items():
        lines.append(f"- {', '.join(names)}: {machine}")
    return "\n".join(lines) + "\n"


def times_as_fast(found: Mapping[str, Any]) -> str:
    """Their time / ours, with its interval."""
    interval = found.get("ratio_interval_95")
    return f"{1 / found['ratio_median']:.3g}" + (f" [{1 / interval[1]:.3g}, {1 / interval[0]:.3g}]" if interval else "")


def reached(found: Mapping[str, Any]) -> str:
    """Whether the goal is: by the whole interval, or, where too few pairs have none, by the median."""
    if not found.get("goal"):
        return ""
    if not found.get("valid", True):
        return "no"
    low, high = found.get("ratio_interval_95") or 2 * (found["ratio_median"],)
    if 1 / high >= found["goal"]:
        return "yes"
    return "undecided" if 1 / low >= found["goal"] else "no"


def machines(cases: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """In words -> the cases that ran there."""
    found: dict[str, list[str]] = {}
    for name, case in cases.items():
        told = case["machine"]
        versions = ", ".join(f"{library} {version}" for library, version in told["versions"].items())
        words = f"{told['device']}, {told['torch_threads']} of torch's, {told['precision']}; {versions}; {told['date']}"
        found.setdefault(words, []).append(name)
    return found
