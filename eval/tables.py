"""What `training.campaign` measured, as tables and curves: FOLDER/README.md is written from FOLDER/*/*.json.

python -m eval.tables --results eval/results
"""

import argparse
import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.curves import FD, KNN, LINEAR, RMS, Panel, Result, best, by_block, curves, neighbours, percent, points, unbroken
from eval.intervals import of_repeats, verdict
from eval.measure import shown_k
from eval.pictures import save
from eval.probed import Probed, compare
from eval.quick import FOLDS
from models.files import Parser, one_line_errors, read_json, written_aside
from models.registry import in_words
from models.shortcut import effective_alpha
from training.checkpoint import revisions
from training.comparisons import COMPARISONS, RESULTS


@dataclass(frozen=True)
class Number:
    """A column of a table.

    Attributes:
        value: of a result; None where it was not asked for.
        lower_is_better: None where neither is.
    """

    value: Callable[[Result], float | None]
    lower_is_better: bool | None = False


NUMBERS = {
    "FD (Lite0)": Number(lambda result: result["fd"]["value"] if "fd" in result else None, lower_is_better=True),
    "KD (Lite0)": Number(lambda result: result["fd"]["metrics"]["KD"]["value"] if "fd" in result else None, lower_is_better=True),
    "kNN, %": Number(lambda result: 100 * neighbours(best(result)) if "probe" in result else None),
    "held out, %": Number(lambda result: 100 * best(result)["linear"]["held_out_accuracy"] if "probe" in result else None),
    "linear probe, %": Number(lambda result: 100 * result["probe"]["value"] if "probe" in result else None),
    "kNN, last block, %": Number(lambda result: percent(neighbours(last)) if (last := _last(result)) else None),
    "linear probe, last block, %": Number(lambda result: percent(last["linear"]["value"]) if (last := _last(result)) else None),
    "effective rank (entropy)": Number(lambda result: best(result)["rank_entropy"] if "probe" in result else None, lower_is_better=None),
    "loss": Number(lambda result: result["curves"][-1]["loss"] if result["curves"] else None, lower_is_better=None),
    "largest RMS": Number(lambda result: max((value for _, value in points(result, RMS)), default=None), lower_is_better=None),
}


@dataclass(frozen=True)
class Hope:
    """A goal of this project, at 64 px after hundreds of epochs, and where to look.

    Attributes:
        number: a column.
        hoped: in words.
        as_ratio: else as a difference.
        where: (comparison, arm, against), of which the first with two training seeds in common answers.
    """

    network: str
    number: str
    hoped: str
    as_ratio: bool
    where: tuple[tuple[str, str, str], ...]


_MAE = (("mae-64px", "decayed", "plain"), ("mae-32px", "decayed-lr-0.0005", "plain"))
_DIT = (("dit-64px", "decayed", "plain"), ("photographs", "decayed", "plain"))
HOPES = (
    Hope("masked autoencoder", "kNN, %", "1.6 times or more", True, _MAE),
    Hope("masked autoencoder", "linear probe, %", "1.07 times or more", True, _MAE),
    Hope("diffusion model", "FD (Lite0)", "0.8 times or less", True, _DIT),
    Hope("diffusion model", "linear probe, %", "+3 or more", False, _DIT),
)
HOPED = (
    "Hoped for: this project's goals for 64 px and hundreds of epochs. The paper's networks gain more: kNN 2.3 times, linear probe 1.07 "
    "times, FID 0.7 times. Plain autoencoders have no long skips, as in the paper (below are differences from those that have them, too), "
    "and in `mae-32px` one learning rate, where fading has the better of two; in `photographs` both networks have long skips."
)
SKIPS = "skips"  # the arm from which faded ones differ in alpha alone
DISTANCES = ("FD", "KD", "FID", "KID")
COMPARED = {"contender", "against", "metric", "difference", "low", "high", "verdict"}
FIELDS = {"comparison", "arm", "seed", "config", "training", "alphas", "curves"}
INTRODUCTION = (
    "Written by `python -m eval.tables --results FOLDER` from the JSON beside it.",
    "Differences are paired: over training seeds (intervals by Student's t), or, of one seed, over the images of its test.",
    "Last block: the mean of all tokens behind the encoder's last block, where the paper probes; other columns, kNN too: the block whose "
    "linear probe is best on held-out training images. A lower rank is not better by itself.",
    "Held out: the linear probe on the training images that choose the block; they may choose between learning rates, too.",
    "Loss: of training images, the mean over the last steps, with weights that are not averaged; a lower one is no better by itself. "
    "Largest RMS: of a block's output for 64 images, in any line of the log.",
    "Verdicts are each for itself: of twenty numbers that do not differ about one is called better or worse by chance.",
    "Minutes of training: at the speed of the fastest run of a network in the comparison, for all of its arms alike, since others "
    "shared their machine. (Fading costs 2 % at most, tests/benchmarks/RESULTS.md; long skips were not timed.)",
    f"Quick looks at features (of autoencoders the last block's, of diffusion models the middle one's) are at a few training images, of "
    f"which one in {FOLDS} is judged: of 500 that are judged, differences of 3 points and less may be chance, of 2,000 differences of 1.5.",
)
LOOKED_AT_UNLESS_TOLD = 2500  # before there was --probe_images


def _last(result: Result) -> Result | None:
    """Where the paper probes autoencoders: the mean of all tokens behind the last block. None for other networks."""
    if "probe" not in result or result["config"]["backbone"] != "mae":
        return None
    return max((row for row in result["probe"]["results"] if row["pooling"] == "mean"), key=lambda row: row["block"])


def read_results(folder: Path) -> dict[str, dict[str, dict[int, Result]]]:
    """comparison -> arm -> training seed -> what the file holds; arms in the order of the campaign.

    Raises:
        ValueError: a file that is no such result.
    """
    found: dict[str, dict[str, dict[int, Result]]] = {}
    for name, comparison in COMPARISONS.items():
        for arm in comparison.arms:
            for path in sorted((folder / name).glob(f"{arm}-*.json")):
                result = read_json(path)
                if not isinstance(result, dict) or not result.keys() >= FIELDS:
                    raise ValueError(f"{path} is no result of training.campaign; move it away")
                if result["config"].get("seed", result["seed"]) != result["seed"]:
                    raise ValueError(f"{path} is of seed {result['config']['seed']}; move it away")
                if result["arm"] == arm:  # one name may begin like another
                    found.setdefault(name, {}).setdefault(arm, {})[result["seed"]] = result
        require_same(str(folder / name), [result for of_seeds in found.get(name, {}).values() for result in of_seeds.values()])
    return found


def require_same(where: str, results: Sequence[Result]) -> None:
    """Raise ValueError for runs on other images, or judged by others: they say nothing about each other."""
    seen: dict[str, set[Any]] = {}
    for result in results:
        probe, fd = result.get("probe", {}), result.get("fd", {})
        seen.setdefault("trained on", set()).add(result["config"].get("data_fingerprint"))
        if probe:
            seen.setdefault("probed on", set()).add((probe.get("train_labels"), probe.get("test_labels")))
        if any("probe_knn" in line for line in result["curves"]):
            seen.setdefault("looked at with", set()).add(result["config"].get("probe_images", LOOKED_AT_UNLESS_TOLD))
        if fd:
            seen.setdefault("measured against", set()).add((fd.get("reference_fingerprint"), fd.get("num_samples")))
    for how, images in seen.items():
        if len(images) > 1:
            raise ValueError(f"{where} holds runs that were {how} {len(images)} sets of images; give each a --results of its own")


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> tuple[float, float, float] | None:
    """Mean difference over the training seeds that both have, and its 95 % interval (Student's t); None for fewer than two."""
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if len(differences) < 2:
        return None
    found = of_repeats(differences)
    return found["value"], found["low"], found["high"]


def hopes(found: Mapping[str, Mapping[str, Mapping[int, Result]]]) -> list[str]:
    """Markdown: what was hoped for and what came, over training seeds; nothing where no comparison answers."""
    lines = []
    for hope in HOPES:
        for comparison, arm, against in hope.where:
            whole = unbroken(found.get(comparison, {}))
            if arm not in whole or against not in whole:
                continue
            scale, back = (math.log, math.exp) if hope.as_ratio else (float, float)
            ours, theirs = (
                {seed: scale(value) for seed, result in whole[each].items() if (value := NUMBERS[hope.number].value(result))}
                for each in (arm, against)
            )
            if change := paired(ours, theirs):
                mean, low, high = map(back, change)
                numbers = f"{mean:.2f} [{low:.2f}, {high:.2f}] times" if hope.as_ratio else f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
                config = next(iter(whole[arm].values()))["config"]
                where = f"`{comparison}` ({config['backbone']}-{config['size']}, {config['resolution']} px): {arm} against {against}"
                lines.append(f"| {hope.network}, {hope.number} | {hope.hoped} | {numbers} | {where} |")
                break
    return ["| | hoped for at 64 px | measured | where |", "|---|---|---|---|", *lines, "", HOPED, ""] if lines else []


def crossing(ours: Sequence[tuple[int, float]], theirs: Sequence[tuple[int, float]]) -> int | None:
    """Images after which `ours` stays above `theirs`, both as (images, value) of the same images, for two looks or more; else None."""
    values = {images: value for images, value in theirs}
    ahead = [(images, value > values[images]) for images, value in ours if images in values]
    last_behind = max((i for i, (_, better) in enumerate(ahead) if not better), default=-1)
    return ahead[last_behind + 1][0] if last_behind + 2 < len(ahead) else None


def table(arms: Mapping[str, Mapping[int, Result]]) -> list[str]:
    """Markdown: a row for each arm; below, how trainings broke down, and the differences from the first arm over training seeds, of
    faded arms from the arm with skips alone as well."""
    whole = unbroken(arms)
    values = {
        name: {
            arm: {seed: value for seed, result in of_seeds.items() if (value := number.value(result)) is not None}
            for arm, of_seeds in whole.items()
        }
        for name, number in NUMBERS.items()
    }
    shown = [name for name, of_arms in values.items() if all(len(of_arms[arm]) == len(of_seeds) for arm, of_seeds in whole.items())]
    base = next(iter(arms))
    lines = ["| arm | alpha_min | alpha_eff | images seen | seeds | " + " | ".join(shown) + " |", "|---" * (5 + len(shown)) + "|"]
    for arm, of_seeds in arms.items():
        result = next(iter(of_seeds.values()))
        seen, alphas = max(each["training"]["images_seen"] for each in of_seeds.values()), result["alphas"]
        broke = "" if arm in whole else f", {sum('broke' in each for each in of_seeds.values())} broke down"
        cells = [arm, f"{min(alphas):.3g}", f"{effective_alpha(alphas):.2g}", f"{seen:,}", f"{len(of_seeds)}{broke}"]
        cells += [f"{np.mean(list(values[name][arm].values())):.4g}" if arm in whole else "-" for name in shown]
        lines.append("| " + " | ".join(cells) + " |")
    for arm, of_seeds in arms.items():
        for seed, result in of_seeds.items():
            if "broke" in result:
                told = f"{arm} with seed {seed} broke down after {result['training']['images_seen']:,} images: {result['broke']}."
                lines += ["", told + (" So there are no differences from it." if arm == base else "")]

    def differences(against: str, others: Sequence[str], about: str) -> list[str]:
        found = {arm: {name: change for name in shown if (change := paired(values[name][arm], values[name][against]))} for arm in others}
        told = {arm: {name: _told(name, *each) for name, each in of_arm.items()} for arm, of_arm in found.items() if of_arm}
        return ["", f"Differences from {against}{about}, with 95 % intervals over training seeds:", "", *crossed(told)] if told else []

    if base in whole:
        lines += differences(base, [arm for arm in whole if arm != base], "")
    if SKIPS in whole and base != SKIPS:
        faded = [arm for arm, of_seeds in whole.items() if arm != SKIPS and min(next(iter(of_seeds.values()))["alphas"]) < 1]
        lines += differences(SKIPS, faded, ", which differs in alpha alone (and the rate, where it has its own)")
    return lines


def crossed(told: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Markdown: arms by numbers, or numbers by arms where there are more of these; a cell that is missing stays empty."""
    names = list(dict.fromkeys(name for of_arm in told.values() for name in of_arm))
    if len(told) > len(names):
        head, rows = names, [[arm, *(of_arm.get(name, "") for name in names)] for arm, of_arm in told.items()]
    else:
        head, rows = list(told), [[name, *(of_arm.get(name, "") for of_arm in told.values())] for name in names]
    return ["| | " + " | ".join(head) + " |", "|---" * (1 + len(head)) + "|", *("| " + " | ".join(row) + " |" for row in rows)]


def _told(name: str, mean: float, low: float, high: float) -> str:
    """A column's difference: points, or other numbers to three digits."""
    numbers = _points(mean, low, high) if name.endswith("%") else f"{mean:+.3g} [{low:+.3g}, {high:+.3g}]"
    return f"{numbers} {_verdict(low, high, NUMBERS[name].lower_is_better)}"


def _points(mean: float, low: float, high: float) -> str:
    """To a tenth; to more digits where an end is so near to 0 that its side could not be seen."""
    digits = next((digits for digits in (1, 2, 3) if all(round(end, digits) or not end for end in (low, high))), 3)
    value, least, most = (f"{each:+.{digits}f}" for each in (mean, low, high))
    return f"{value} [{least}, {most}]"


def _verdict(low: float, high: float, lower_is_better: bool | None) -> str:
    """The verdict on a difference's interval."""
    if lower_is_better is None:
        return "lower" if high < 0 else "higher" if low > 0 else "undecided"
    return verdict(low, high, lower_is_better)


def protocol(arms: Mapping[str, Mapping[int, Result]]) -> str:
    """One line on how the numbers came about, and with which rates and code others broke down."""
    result = next(iter(next(iter((unbroken(arms) or arms).values())).values()))
    results = [run for runs in arms.values() for run in runs.values()]
    configs, parts = [run["config"] for run in results], []

    def noted(judge: str) -> str:
        notes = dict.fromkeys(note for run in results for note in run.get(judge, {}).get("notes", ()))
        return f" ({'; '.join(notes)})" if notes else ""

    def all_of(value: Callable[[Result], str]) -> str:
        return " / ".join(dict.fromkeys(map(value, configs)))

    def network(config: Result) -> str:
        return f"{config['resolution']} px, {in_words(config['backbone'], config['size'], config.get('depth'))}"

    data = [f"data {result['training']['data']}"] if "broke" not in result else []
    parts.append(", ".join([*data, all_of(network)]))
    rates = all_of(lambda config: f"{config['learning_rate']:g}")
    steps = all_of(lambda config: str(config["images_a_step"]))
    parts.append(f"{steps} images a step, learning rate {rates}, {all_of(lambda config: config['precision'])}")
    if "probe" in result:
        probe = result["probe"]
        images = f"{probe['num_samples']:,} test images, fitted on {probe['train_num']:,}"
        where = f"the block (and time) that is best on held-out training images, k = {shown_k([best(result)])}"
        parts.append(f"probed on {images}, at {where}, rank over {probe['rank_images']:,} images{noted('probe')}")
    if any("probe_knn" in line for line in result["curves"]):
        looked_at = result["config"].get("probe_images", LOOKED_AT_UNLESS_TOLD)
        parts.append(f"quick looks at {looked_at:,} training images (or at all, where there are fewer)")
    if "fd" in result:
        fd = result["fd"]
        how = f"{fd['sampler']} {fd['steps']} steps, guidance {fd['guidance_scale']:g}, seed {fd['seed']}"
        parts.append(f"FD of {fd['num_samples']:,} samples against {fd['reference_num']:,} of {fd['reference']}, {how}{noted('fd')}")
    parts += [f"device {result[judge]['device']}" for judge in ("probe", "fd") if judge in result][:1]
    codes = {arm: list(dict.fromkeys(code for run in runs.values() for code in revisions(run["config"]))) for arm, runs in arms.items()}
    if len({code for of_arm in codes.values() for code in of_arm}) > 1:
        parts.append("trained by different revisions: " + ", ".join(f"{arm} {' '.join(of_arm)}" for arm, of_arm in codes.items()))
    return "; ".join(parts) + "."


def commands(name: str, arms: Mapping[str, Mapping[int, Result]]) -> str:
    """What repeats a comparison: a command for all arms, or one for those with the same seeds and flags."""
    alike: dict[tuple[str, str], list[str]] = {}
    for arm, of_seeds in arms.items():
        of_flags: dict[str, list[int]] = {}
        for seed, result in sorted(of_seeds.items()):
            flags = result.get(
                "flags", ["--compile"] * bool(result["config"].get("compile"))
            )  # of results that are older than flags in them
            of_flags.setdefault(shlex.join(flags), []).append(seed)
        for words, seeds in of_flags.items():
            alike.setdefault((",".join(map(str, seeds)), words and f" {words}"), []).append(arm)
    every = len(alike) == 1 and len(arms) == len(COMPARISONS[name].arms)
    parts = [
        f"`python -m training.campaign {name} --data FOLDER --seeds {seeds}{'' if every else ' --arms ' + ','.join(some)}{words}`"
        for (seeds, words), some in alike.items()
    ]
    return f"Repeated by {' and '.join(parts)}."


def crossings(arms: Mapping[str, Mapping[int, Result]], panel: Panel, sign: int) -> str:
    """Where every arm gets ahead of the first in a panel's curve for good, seed by seed; empty where there is no such curve.

    Args:
        sign: -1 where less is better.
    """
    base, told = next(iter(arms)), []
    for arm, of_seeds in list(arms.items())[1:]:
        found: dict[str, list[str]] = {}
        for seed in (seed for seed in of_seeds if seed in arms[base]):
            ours, theirs = ([(images, sign * value) for images, value in points(arms[each][seed], panel)] for each in (arm, base))
            if ours and theirs:
                images = crossing(ours, theirs)
                where = "never" if images is None else "from the first look on" if images == ours[0][0] else f"from {images:,} images on"
                found.setdefault(where, []).append(str(seed))
        if found:
            seeds = (f"{where} (seed{'s' * (len(some) > 1)} {', '.join(some)})" for where, some in found.items())
            told.append(f"{arm} {', '.join(seeds)}")
    return f"Ahead of {base} in {panel.label}, for two looks or more and to the end: {'; '.join(told)}." if told else ""


def over_images(path: Path, arms: Mapping[str, Mapping[int, Result]]) -> list[str]:
    """Markdown: what the arms of one seed say, paired over images: from the file that says so, or, of probes, from the results.

    Args:
        path: of the comparison, compared-SEED.json; it need not be there.
        arms: of which none broke down.

    Raises:
        ValueError: a file that is none of these.
    """
    seed = path.stem.rpartition("-")[2]
    compared = read_json(path) if path.is_file() else []
    if not all(isinstance(each, dict) and each.keys() >= COMPARED for each in compared):
        raise ValueError(f"{path} does not compare arms of training.campaign; move it away")
    probes = {arm: of_seeds[int(seed)]["probe"] for arm, of_seeds in arms.items() if "probe" in of_seeds.get(int(seed), {})}
    if probes and set(probes) - {each[side] for each in compared for side in ("contender", "against")}:  # not yet, or not of all
        compared = compare([Probed(arm, None, probe) for arm, probe in probes.items()])
    bases = {each["against"] for each in compared}
    if len(bases) > 1:
        raise ValueError(f"{path} compares arms with {' and '.join(sorted(bases))}; move it away, and the campaign writes another")
    found: dict[str, dict[str, str]] = {}
    for each in compared:
        ends = (each[part] for part in ("difference", "low", "high"))
        if each["metric"].startswith(DISTANCES):
            numbers = "{:+.3g} [{:+.3g}, {:+.3g}]".format(*ends)
        else:
            numbers = _points(*(100 * end for end in ends))
        found.setdefault(each["contender"], {})[each["metric"]] = f"{numbers} {each['verdict']}"
    if not found:
        return []
    return [
        "",
        f"Differences from {bases.pop()}, of seed {seed}, with 95 % intervals over images alone, drawn ones for FD and KD, tested ones "
        "(and in points) for probes:",
        "",
        *crossed(found),
    ]


def write(folder: Path) -> list[str]:
    """Write README.md and the curves into the folder of the results; returns the names of the comparisons.

    Raises:
        ValueError: no results there, or a file that is none.
    """
    found = read_results(folder)
    if not found:
        raise ValueError(f"{folder} holds no results of a campaign; python -m training.campaign writes some")
    lines = ["# What was measured", "", *hopes(found), *INTRODUCTION, ""]
    for name, arms in found.items():
        whole = unbroken(arms)
        lines += [f"## {name}: {COMPARISONS[name].about}", "", *table(arms), "", protocol(arms), "", commands(name, arms)]
        seeds = sorted({seed for of_seeds in arms.values() for seed in of_seeds})
        for seed in seeds:
            compared = folder / name / f"compared-{seed}.json"
            # with several seeds the table has intervals over these
            if compared.is_file() or (len(seeds) == 1 and next(iter(arms)) in whole):
                lines += over_images(compared, whole)
        for panel, sign in ((KNN, 1), (LINEAR, 1), (FD, -1)):
            if next(iter(arms)) in whole and (told := crossings(whole, panel, sign)):
                lines += ["", told]
        lines.append("")
        if figure := curves(arms):
            save(folder / name / "curves.png", figure)
            lines += [f"![curves over images seen and over time]({name}/curves.png)", ""]
        if whole and all("probe" in result for of_seeds in whole.values() for result in of_seeds.values()):
            blocks, where = by_block(whole)
            save(folder / name / "blocks.png", blocks)
            autoencoders = all(result["config"]["backbone"] == "mae" for of_seeds in whole.values() for result in of_seeds.values())
            behind = " (of a plain autoencoder the last block's behind the encoder's norm)" if autoencoders else ""
            lines += [
                f"The probe {where}{behind}:",
                "",
                f"![{where}]({name}/blocks.png)",
                "",
            ]
    with written_aside(folder / "README.md") as aside:
        aside.write_text("\n".join(lines), encoding="utf-8")
    return list(found)


def parser() -> argparse.ArgumentParser:
    """Flags of the command line."""
    flags = Parser(prog="python -m eval.tables", description=__doc__)
    flags.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    return flags


def main() -> None:
    """The command line."""
    parsed = parser().parse_args()
    with one_line_errors():
        names = write(parsed.results)
        print(f"{parsed.results / 'README.md'}: {', '.join(names)}")


if __name__ == "__main__":
    main()
