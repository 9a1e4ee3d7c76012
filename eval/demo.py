"""Train, sample, judge and compare a small pair, plain beside decayed; then write report.html.

make demo
"""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from eval.extractors import LITE0
from eval.generate import SamplingOptions, generate
from eval.report import Section, loss_curves, norm_curves, paragraph, strip, table, write_report
from models.files import INDEX, Parser, is_checkpoint, one_line_errors, read_json
from models.pipeline import Pipeline
from training.checkpoint import checkpoints
from training.monitor import read_metrics
from training.options import add_options, option, read_options
from training.presets import PRESETS

PAIR = ("plain", "decayed")
WARNING = (
    "This shows that every station works, and nothing else. Minutes of training say nothing about the effect of fading shortcuts, "
    "which the paper reports after hundreds of epochs."
)


@dataclass(frozen=True)
class DemoOptions:
    """Demo."""

    output_dir: str = option("runs/demo", "where report.html goes; beside it the runs demo-plain and demo-decayed, used if they are there")
    max_train_steps: int = option(PRESETS["demo-plain"].flags["max_train_steps"], "of each model", least=1)
    num_samples: int = option(256, "images of each model to judge", least=2)


def train(kind: str, run: Path, steps: int) -> None:
    """Train one of the pair to `steps`, or go on where an interrupted demo stopped."""
    if is_checkpoint(run) and read_json(run / INDEX)["training"]["steps"] >= steps:
        print(f"{run} is trained already")
        return
    flags = ["--preset", f"demo-{kind}", "--output_dir", str(run), "--max_train_steps", str(steps)]
    flags += ["--resume_from_checkpoint", "latest"] if checkpoints(run) else []
    _call("training/train_diffusion.py", *flags)


def judge(run: Path, num_samples: int) -> dict:
    """FD against the validation emoji, from a process of its own."""
    result = run / "eval" / "fd.json"
    flags = ["--reference", "openmoji", "--reference_split", "validation", "--feature_extractor", LITE0, "--mixed_precision", "auto"]
    _call("eval/fid.py", "--checkpoint", str(run), *flags, "--num_samples", str(num_samples), "--json", str(result))
    return read_json(result)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    flags = Parser(description=__doc__)
    add_options(flags, DemoOptions)
    parsed = flags.parse_args(arguments)
    with one_line_errors():
        options = read_options(parsed, DemoOptions)
        folder = Path(options.output_dir)
        runs = {kind: folder.with_name(f"{folder.name}-{kind}") for kind in PAIR}
        for kind, run in runs.items():
            train(kind, run, options.max_train_steps)
        results = {kind: judge(run, options.num_samples) for kind, run in runs.items()}
        write_report(folder / "report.html", "Fading Shortcuts: a demo", WARNING, sections(runs, results))
        print(f"open {folder / 'report.html'}")


def sections(runs: dict[str, Path], results: dict[str, dict]) -> list[Section]:
    """What the report shows."""
    rows = [
        {
            "model": kind,
            "alpha_min": f"{result['alpha_min']:g}",
            "alpha_eff": f"{result['alpha_eff']:.2g}",
            "parameters": f"{result['params']:,}",
            "images seen": f"{result['images_seen']:,}",
            "loss (last line)": f"{read_metrics(runs[kind])[-1]['loss']:.3f}",
            f"FD ({LITE0})": f"{result['value']:.1f} [{result['low']:.1f}, {result['high']:.1f}]",
        }
        for kind, result in results.items()
    ]
    one = results["plain"]
    protocol = (
        f"{one['metric']} of {one['num_samples']} samples against {one['reference_num']} validation emoji, {one['sampler']}, "
        f"{one['steps']} steps, guidance {one['guidance_scale']:g}, seed {one['seed']}, labels {one['labels']}, EMA weights, "
        f"{one['precision']}, {one['device']}. {' '.join(one['notes'])} Intervals (95 %) over samples; one training seed."
    )
    strips = []
    for kind, run in runs.items():
        pipeline = Pipeline.from_pretrained(run)
        images = generate(pipeline, SamplingOptions(num_samples=pipeline.num_classes, guidance_scale=2.0))
        strips.append(strip(images, f"{kind}: one image of each class, seeds 0 to {len(images) - 1}, guidance 2"))
    curves = loss_curves(runs, "Training loss, mean of 10 steps") + norm_curves(runs, "The stream's size where it is read out")
    return [
        Section("The pair", table(rows) + paragraph(protocol)),
        Section("The same noise, two models", "".join(strips)),
        Section("While training", curves),
    ]


def _call(*command: str) -> None:
    """Run a script of the project with its output passed through; its failure ends the demo with the same exit code."""
    code = subprocess.run([sys.executable, *command]).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    main()
