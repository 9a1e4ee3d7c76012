"""Results as a page of Markdown."""

from collections.abc import Mapping
from typing import Any

INTRODUCTION = (
    "Written by `python -m tests.benchmarks NAME ... --json FILE`: both sides in one run, in turn, the order swapped from pair to pair.",
    "*Times as fast* is the median over pairs of their time / ours, with its 95 % interval (order statistics; fewer than six pairs have",
    "none); processor time is what to look at where other work was on the machine. *Of memory* is our peak / theirs, of the tensors that",
    "autograd allocates. A goal that is not reached stands here as it is.",
)
LIMITS = (
    "How far a training step is from the limits of the machine: its matrix products at the rate of one large product, and its weights,",
    "gradients and moments read and written once at the rate of a large copy. *Of the data sheet* is the model's operations a second",
    "as a share of those that a GPU's maker names for dense bf16 (model FLOP utilisation).",
)
TRIED = (
    "GELU by tanh: torch's kernel takes 6 times as long as the exact one on a CPU (2.0 against 0.3 ms for 2,048 x 768 in bf16). "
    "An autograd function of plain steps gained a fifth of that; compiled it is a sigmoid. DiT's definition stays.",
    "Channels-last for the U-Net on a CPU, bf16: 1.02 of the time (S, 32 px, 8 images); left as it was.",
    "One kernel forward and one backward for the decayed add: no measurable gain over the plain addition with a factor.",
    "The factor of the way back (one multiplication a sub-layer, which a plain sum does not have) folded into the sum of both gradients, "
    "by a pair of autograd functions: 1.017 of a plain step of DiT-XS where the plain addition with a factor took 1.011 (60 triples).",
    "Averaging the weights every k steps: the average of DiT-XS costs about 1 % of a step on 2 cores; it is taken in every step.",
    "Bytes to floats in one pass, in six ways, or image by image in the cache: none faster than three passes over all.",
    "Turning images round as bytes, with `index_select` instead of brackets (a tenth of the time): 10 became 12 times as fast as "
    "ImageFolder. A batch of `feed` takes 3 ms, by itself 2.5: picking 0.5, channels in their order 0.6, turning round 0.7, floats 0.8; "
    "40 times would leave 0.9 ms for all.",
    "Attention in bf16 on CPUs: torch's fused backward pass takes 2.2 times as long as in fp32 at 64 tokens, and that 2.7 times as long as "
    "two bf16 products with a softmax between, which stand there now.",
    "torch's softmax over a few classes, in the linear probe: six times as long as max, exp and sum by hand, which stand there now.",
    "Sampling without guidance in the early steps: FD of 96 emoji (unipc, 8 steps) 135.3 where it begins at 0.2, 129.8 guided throughout; "
    "without it in the late ones (from 0.8 on) 129.4, so these are left out.",
    "numpy's `** 3` in the kernel distance (14 times as long as two products) and torch's `kthvalue` on a CPU (8 times as long as `topk`).",
    "The exact GELU compiled with a rational erf (Abramowitz and Stegun 7.1.26) and a backward pass by hand: no gain forward, 0.12 of "
    "0.42 ms backward for a million numbers, 2 % of a step of MAE-XS; torch's stays.",
    "A step of MAE-XS, compiled or not: two thirds of its time and more are matrix products, most on the way back, and these run at "
    "about half the rate of a large product (oneDNN's, of matrices 128 to 768 wide; by a profile of one thread, beside other work); "
    "compiling, which melts the rest, gains 6 %.",
    "A training beside a sampling, by hand, two runs each: sampling took 11 to 12 s, 8.7 to 11.2 where the training was nice by 2 or 3, "
    "6.1 to 6.7 by 5, 3.2 to 3.5 by 10, and 2.7 alone (3.5 to 3.9 in the runs of 2 to 5). Threads that turn round less while they wait "
    "(GOMP_SPINCOUNT 1000 for the training) made both 1.7 times as fast, but the training 9 % slower alone.",
    "Two threads that crop and resize half a batch each: they wait for Python more than they gain; one writes each crop where it stays.",
    "Peers: their rows are of a day on which the machine multiplied at half of its rate of two days before (compare the products of `loop` "
    "and `loop (SiT)`); bf16 gains less there: in the same minutes `loop` gave 1.80 [1.79, 1.83] (10 pairs) instead of 2.49.",
    "The stream of a DiT in float32 under autocast, as SiT's is, instead of bf16: 1.15 of the time of a step of DiT-XS eager, 1.06 "
    "compiled (32 images, 40 pairs, on two cores, by hand); left in bf16, as diffusers' is.",
)


def page(cases: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of ratios, what belongs to them, the limits of the training steps, and what was tried.

    Args:
        cases: name -> what `python -m tests.benchmarks` found of it.
    """
    head = "| case | what | times as fast | of processor time | of memory | goal | reached | pairs |"
    lines = ["# Speed", "", *INTRODUCTION, "", head, "|---" * 8 + "|"]
    for name, found in cases.items():
        interval = found.get("ratio_interval_95")
        ratio = f"{1 / found['ratio_median']:.3g}" + (f" [{1 / interval[1]:.3g}, {1 / interval[0]:.3g}]" if interval else "")
        goal = f"{found['goal']:.3g}" if found.get("goal") else ""
        memory = f"{found['ours_peak_bytes'] / found['theirs_peak_bytes']:.3f}" if "ours_peak_bytes" in found else ""
        cells = [
            name,
            found["about"],
            ratio,
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
    lines += ["", "Tried, and what came of it:", "", *(f"- {line}" for line in TRIED), "", "Machines:", ""]
    for machine, names in machines(cases).items():
        lines.append(f"- {', '.join(names)}: {machine}")
    return "\n".join(lines) + "\n"


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
        words = f"{told['device']}, {told['torch_threads']} threads, {told['precision']}; {versions}; {told['date']}"
        found.setdefault(words, []).append(name)
    return found
