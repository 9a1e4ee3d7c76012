"""Compare checkpoints on the same noise: what differs, by how much, and whether the samples suffice to say so.

    python eval/compare.py runs/plain runs/decayed --reference openmoji --output runs/plain-decayed
    python eval/compare.py runs/x runs/x@raw --reference openmoji                     averaged against raw weights
    python eval/compare.py runs/x --reference openmoji --sweep steps=5,10,20,50 guidance=1,1.5,2,4 --output runs/x/sweep
    python eval/compare.py runs/a/eval/fid.json runs/b/eval/fid.json                  numbers taken earlier
    python eval/compare.py runs/a runs/b                                              what eval/probe.py found in their features
    python eval/compare.py eval/results/mae-32px/skips-0.json eval/results/mae-32px/decayed-0.json    the same, in results of campaigns

Image i of every checkpoint comes from the same noise and the same label, and the interval (95 %) of a difference is of these pairs.
Every checkpoint is compared with the first one: "better" or "worse" if the interval leaves out 0, else "undecided".
"""

import argparse
import html
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from eval.features import ArrayImages
from eval.generate import SamplingOptions, all_images, check_guidance, check_sampling, generate, label_counts, load_guide
from eval.intervals import LEVEL, Estimate, difference, verdict
from eval.judge import COMPARABLE, SAMPLED, Judge, MetricOptions, checkpoint_protocol, reference_words, training_notes
from eval.metrics import HIGHER_IS_BETTER
from eval.pictures import save
from eval.probed import compare_probes, probes_of
from eval.report import Section, as_text, paragraph, strip, table, write_report
from eval.sources import coloured, open_source, require_one_size
from eval.spread import is_main, processes
from models.files import Parser, has_averages, one_line_errors, read_json, require_writable, write_json
from models.pipeline import Pipeline
from training.images import SPLITS
from training.options import add_options, option, read_options
from training.processes import spread_over_cpu_processes

STRIP = 12  # images of each contender
RAW = "@raw"
PROTOCOL = {"metric", "value", "num_samples", "feature_extractor", "reference", "reference_num"}  # that every evaluation tells
SWEEPABLE = {"steps": ("num_inference_steps", int, 1, 1000), "guidance": ("guidance_scale", float, 0, 100)}


@dataclass(frozen=True)
class CompareOptions:
    """Comparison."""

    reference: str | None = option(None, 'real images: "openmoji", a folder of images or of parquet files, a hub name, or an .npz')
    reference_split: str = option("train", "split of the reference, if it is a data set", choices=SPLITS)
    output: str | None = option(None, "folder for comparison.json, comparison.html and its pictures")


@dataclass(frozen=True)
class Entry:
    """One contender under one setting.

    Attributes:
        result: the numbers with their protocol.
        estimates: what pairing needs; None for numbers taken earlier.
        images: uint8 (STRIP, H, W, 3), or None.
    """

    name: str
    setting: str
    result: dict[str, Any]
    estimates: dict[str, Estimate] | None = None
    images: np.ndarray | None = None


def parser() -> argparse.ArgumentParser:
    """Flags of the command line."""
    flags = Parser(description=__doc__)
    flags.add_argument(
        "contenders",
        nargs="+",
        metavar="RUN",
        help=f"checkpoints (RUN{RAW}: its raw weights), or .json files of eval/fid.py, eval/probe.py or a campaign",
    )
    flags.add_argument(
        "--sweep", nargs="+", default=[], metavar="NAME=V,V", help="values of steps and guidance: every combination is judged"
    )
    for group in (CompareOptions, SamplingOptions, MetricOptions):
        add_options(flags, group)
    return flags


def sweep_settings(words: Sequence[str]) -> list[dict[str, Any]]:
    """`steps=5,10 guidance=1,2` -> every combination, as fields of `SamplingOptions`; one empty one for no words.

    Raises:
        ValueError: a name or a value that cannot be swept over.
    """
    axes = []
    for word in words:
        name, _, values = word.partition("=")
        if name not in SWEEPABLE:
            raise ValueError(f"--sweep {word}: choose from {', '.join(SWEEPABLE)}, such as steps=5,10,20")
        field, kind, least, most = SWEEPABLE[name]
        try:
            numbers = [kind(value) for value in values.split(",")]
        except ValueError:
            raise ValueError(f"--sweep {word}: {values!r} are no numbers; give such as steps=5,10,20") from None
        if not all(least <= number <= most for number in numbers):
            raise ValueError(f"--sweep {word}: {name} must be between {least} and {most}")
        axes.append([{field: number} for number in dict.fromkeys(numbers)])
    return [{key: value for part in parts for key, value in part.items()} for parts in itertools.product(*axes)]


def judge_contenders(
    paths: Sequence[str], settings: Sequence[dict[str, Any]], options: CompareOptions, sampling: SamplingOptions, metric: MetricOptions
) -> list[Entry]:
    """Sample and measure every contender under every setting; what is cheap to check comes first."""
    if options.reference is None:
        if missing := [path for path in paths if not Path(path.removesuffix(RAW)).exists()]:
            raise ValueError(f"{missing[0]} does not exist; give folders of runs, or .json files of earlier evaluations")
        raise ValueError("give --reference; only .json files of earlier evaluations and runs that eval/probe.py looked at go without")
    if all(setting.get("guidance_scale", sampling.guidance_scale) == 1 for setting in settings):
        check_guidance(sampling)
    split = {path: (path.removesuffix(RAW), not path.endswith(RAW)) for path in dict.fromkeys(paths)}
    shapes = {}
    for path, (folder, ema) in split.items():
        pipeline = Pipeline.from_pretrained(folder, ema=ema)
        if not ema and not has_averages(folder):
            raise ValueError(f"{folder} has no averaged weights beside the raw ones; leave {RAW} away")
        shapes[path] = pipeline.image_shape
        for setting in settings:
            check_sampling(pipeline, replace(sampling, **setting))
        if sampling.guide:
            load_guide(pipeline, sampling.guide)  # a pair that does not fit is told now
    if len(set(shapes.values())) > 1:
        listed = ", ".join(f"{path} {shape[1]} px" for path, shape in shapes.items())
        raise ValueError(f"the contenders draw images of different shapes ({listed}); compare those of one")
    _, height, width = pipeline.image_shape
    source = open_source(options.reference, None, height, options.reference_split, as_data=True)
    require_one_size(paths[0], (width, height), source)
    judge = Judge(source, metric, sampling.batch_size)

    entries = []
    for path, (folder, ema) in split.items():
        pipeline = Pipeline.from_pretrained(folder, ema=ema).to(judge.device)
        counts = label_counts(tuple(pipeline.config.class_names), sampling, source.data)
        for setting in settings:
            each = replace(sampling, **setting)
            images = coloured(generate(pipeline, each, counts))
            measured = judge(ArrayImages(images), path)
            made = checkpoint_protocol(folder, pipeline, each, ema and has_averages(folder), counts)
            result = judge.result([measured], made, training_notes(pipeline, source))
            words = ", ".join(f"{name} {setting[field]:g}" for name, (field, *_) in SWEEPABLE.items() if field in setting)
            shown = all_images(images[:STRIP], each)  # every process has its own batches of the first ones, too
            entries.append(Entry(path, words, result, measured.estimates, shown.copy()))  # the features are let go
    return entries


def read_entries(paths: Sequence[str]) -> list[Entry]:
    """Numbers taken earlier.

    Raises:
        ValueError: not an evaluation, or numbers that cannot stand in one column, and why.
    """
    entries = []
    for path in paths:
        result = read_json(path)
        if not isinstance(result, dict) or not result.keys() >= PROTOCOL:
            raise ValueError(f"{path} is no evaluation of eval/fid.py: metric, value or protocol is missing")
        metrics = result.setdefault("metrics", {result["metric"]: {"value": result["value"]}})
        if not all(isinstance(each, dict) and isinstance(each.get("value"), int | float) for each in metrics.values()):
            raise ValueError(f"{path} is no evaluation of eval/fid.py: its metrics have no values")
        entries.append(Entry(path, "", result))
    for other in entries[1:]:
        differ = [
            f"{name} {entries[0].result.get(name)} and {other.result.get(name)}"
            for name in COMPARABLE
            if entries[0].result.get(name) != other.result.get(name)
        ]
        if differ:
            raise ValueError(f"{entries[0].name} and {other.name} cannot stand in one column: {'; '.join(differ)}")
    return entries


def compare(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """Every contender against the first one under the same setting: a row for each number that both have."""
    rows = []
    for entry in entries:
        first = next(each for each in entries if each.setting == entry.setting)
        if entry is first:
            continue
        for name in entry.result["metrics"]:
            if name not in first.result["metrics"]:
                continue
            value, low, high, how = _difference(entry, first, name)
            word = "undecided" if math.isnan(low) else verdict(low, high, name not in HIGHER_IS_BETTER)
            about = {"contender": entry.name, "against": first.name, "setting": entry.setting, "metric": name}
            rows.append({**about, "difference": value, "low": low, "high": high, "level": LEVEL, "interval": how, "verdict": word})
    return rows


def _difference(entry: Entry, first: Entry, name: str) -> tuple[float, float, float, str]:
    """Difference, both ends of its interval (NaN where there is none), and how that was found."""
    if entry.estimates is not None and first.estimates is not None and entry.result["labels"] == first.result["labels"]:
        found = difference(entry.estimates[name], first.estimates[name])
        return found.value, *found.interval(), found.how
    one, other = entry.result["metrics"][name], first.result["metrics"][name]
    value = one["value"] - other["value"]
    if "low" not in one or "low" not in other:
        return value, math.nan, math.nan, "none: a number taken without an interval"
    reach = math.hypot(one["high"] - one["low"], other["high"] - other["low"]) / 2
    return value, value - reach, value + reach, "of two independent numbers; on the same seeds it is too wide"


def evaluations(result: dict[str, Any]) -> int:
    """What an image costs: how often a network sees it (guidance doubles it, and so does Heun); guidance in a part of the time costs
    less than is counted here."""
    doubled = result["guidance_scale"] != 1 and (result["guide"] or result["labels"] is not None)
    steps = 2 * result["steps"] - 1 if result["sampler"] == "heun" else result["steps"]
    return steps * (2 if doubled else 1)


def pareto(costs: Sequence[float], values: Sequence[float]) -> list[int]:
    """Indices of the points that none beats in both, both the smaller the better, by rising cost."""
    front: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], values[i])):
        if not front or values[i] < values[front[-1]]:
            front.append(i)
    return front


def draw_pareto(path: Path, entries: Sequence[Entry], metric: str) -> None:
    """Distance over cost, and precision over recall where they were asked for: a colour for each contender, its best points joined."""
    with_balance = "precision" in entries[0].result["metrics"]
    figure = Figure(figsize=(12 if with_balance else 6, 4), layout="constrained")
    axes = figure.subplots(1, 2 if with_balance else 1, squeeze=False)[0]
    for name in dict.fromkeys(entry.name for entry in entries):
        own = [entry for entry in entries if entry.name == name]
        numbers = [{key: found["value"] for key, found in entry.result["metrics"].items()} for entry in own]
        pairs = [([evaluations(entry.result) for entry in own], [each[metric] for each in numbers], 1)]
        if with_balance:
            pairs.append(([each["recall"] for each in numbers], [each["precision"] for each in numbers], -1))
        for axis, (x, y, sign) in zip(axes, pairs, strict=True):
            points = axis.plot(x, y, "o", label=name)[0]
            front = pareto([sign * each for each in x], [sign * each for each in y])
            axis.plot([x[i] for i in front], [y[i] for i in front], color=points.get_color())
            for entry, *at in zip(own, x, y, strict=True):
                axis.annotate(entry.setting, at, fontsize=6, xytext=(3, 3), textcoords="offset points")
    axes[0].set(xlabel="network evaluations an image", ylabel=metric, xscale="log")
    costs = sorted({evaluations(entry.result) for entry in entries})
    axes[0].set_xticks(costs, map(str, costs))
    axes[0].minorticks_off()
    if with_balance:
        axes[1].set(xlabel="recall", ylabel="precision")
    axes[0].legend(frameon=False)
    save(path, figure)


def number_rows(entries: Sequence[Entry]) -> list[dict[str, str]]:
    """A row for each contender and setting."""
    names = dict.fromkeys(name for entry in entries for name in entry.result["metrics"])
    return [
        {"contender": entry.name, "setting": entry.setting, **{name: _number(entry.result["metrics"].get(name)) for name in names}}
        for entry in entries
    ]


def difference_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """The differences, to read."""
    return [{**{key: row[key] for key in ("contender", "setting", "metric")}, "difference": _number(row, "difference"),
             "verdict": row["verdict"]} for row in rows]  # fmt: skip


def _number(found: dict[str, Any] | None, key: str = "value") -> str:
    if found is None:
        return ""
    has_interval = "low" in found and not math.isnan(found["low"])
    return f"{found[key]:.4g}" + (f" [{found['low']:.4g}, {found['high']:.4g}]" if has_interval else "")


def protocol_line(entries: Sequence[Entry]) -> str:
    """What all numbers share, and how they sampled where that is the same."""
    result = entries[0].result
    line = f"{result['num_samples']:,} samples each against {reference_words(result)}, through {result['feature_extractor']}"
    line += f" ({result.get('feature_extractor_weights')})"
    for name in (*SAMPLED, "seed"):
        values = list(dict.fromkeys(entry.result.get(name) for entry in entries))
        if values != [None]:
            line += f", {name} {' / '.join(map(str, values))}"
    return line


def write_all(folder: Path, entries: Sequence[Entry], rows: Sequence[dict[str, Any]], swept: bool) -> None:
    """comparison.json, comparison.html and the pictures."""
    numbers = [{"name": entry.name, "setting": entry.setting, **entry.result} for entry in entries]
    write_json(folder / "comparison.json", {"entries": numbers, "differences": [_finite(row) for row in rows]})
    sections = [Section("Numbers", table(number_rows(entries)) + paragraph(protocol_line(entries)))]
    if rows:
        sections.append(Section(f"Against {rows[0]['against']}", table(difference_rows(rows))))
    if swept:
        draw_pareto(folder / "pareto.png", entries, next(iter(entries[0].result["metrics"])))
        sections.append(Section("What it costs", '<img src="pareto.png" alt="Pareto curves">'))
    strips = [strip(entry.images, f"{entry.name} {entry.setting}") for entry in entries if entry.images is not None]
    if strips:
        sections.append(Section("The same noise", "".join(strips)))
    notes = dict.fromkeys(note for entry in entries for note in entry.result.get("notes", ()))
    sections.append(Section("Notes", "".join(f"<p>{html.escape(note)}</p>" for note in notes)))
    about = "Differences with their 95 % intervals over the generated images; another training seed would move the numbers too."
    write_report(folder / "comparison.html", "Comparison", about, sections)


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parsed = parser().parse_args(arguments)
    with one_line_errors():
        options = read_options(parsed, CompareOptions)
        sampling, metric = read_options(parsed, SamplingOptions), read_options(parsed, MetricOptions)
        settings = sweep_settings(parsed.sweep)
        if options.output and Path(options.output).is_file():
            raise ValueError(f"--output {options.output} is a file; give a folder")
        if options.output:
            require_writable(Path(options.output), "choose another --output")
        if missing := [path for path in parsed.contenders if path.endswith(".json") and not Path(path).is_file()]:
            raise ValueError(f"{missing[0]} does not exist; give .json files of earlier evaluations, or folders of runs")
        if options.reference is None and any(map(probes_of, parsed.contenders)):
            compare_probes(parsed.contenders, options.output)
            return
        earlier = [path.endswith(".json") for path in parsed.contenders]
        if any(earlier) and not all(earlier):
            raise ValueError("compare checkpoints with checkpoints and .json files with .json files; pairs need the samples of both")
        spread_over_cpu_processes()
        processes()
        if all(earlier):
            entries = read_entries(parsed.contenders)
        else:
            entries = judge_contenders(parsed.contenders, settings, options, sampling, metric)
        rows = compare(entries)
        if not is_main():
            return
        print(as_text(number_rows(entries)))
        if rows:
            print(f"\nagainst {rows[0]['against']}:\n{as_text(difference_rows(rows))}")
        print(f"\n{protocol_line(entries)}")
        for note in dict.fromkeys(note for entry in entries for note in entry.result.get("notes", ())):
            print(f"note: {note}")
        if options.output:
            write_all(Path(options.output), entries, rows, swept=len(settings) > 1 and not all(earlier))
            print(f"open {Path(options.output) / 'comparison.html'}")


if __name__ == "__main__":
    main()
