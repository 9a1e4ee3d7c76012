"""Judge a network by its features: neighbours, linear probes, rank, similarity; every block, in one pass over the data.

    python eval/probe.py --checkpoint runs/x --dataset openmoji
    python eval/probe.py --checkpoint runs/x --dataset my_images --attentive --few_shot 0.01,0.1 --reference_network efficientnet-lite0
    python eval/probe.py --timm vit_small_patch16_224 --timm_weights pretrained --dataset my_images --output probes/vit
    python eval/probe.py --features my_features.npz --output probes/mine

Probes are fitted to the training split; what they leave open (the penalty, the best block) is chosen on a part of it that is held
out. The validation split is only tested on. Diffusion models look at noisy images, at several times, and are never told a label.
"""

import argparse
import time
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval import pictures
from eval.encoders import TEST_SEEDS, DiffusionEncoder, Encoder, MAEEncoder, Place, block_shapes, block_tokens, require_tokens
from eval.extractors import LITE0
from eval.finetune import finetune, require_pixels
from eval.linear import STEPS, attentive_probe, held_out_parts
from eval.looking import (
    DataOptions,
    Looked,
    LookedThrough,
    LookOptions,
    NetworkOptions,
    check_neighbours,
    look,
    numbers,
    part_of,
    read_features,
    reference_of,
)
from eval.measure import (
    CKNNA_K,
    FEW_SHOT_DRAWS,
    RANK_IMAGES,
    SIMILARITY_IMAGES,
    accuracy,
    baseline,
    best_row,
    drop_hits,
    few_shot,
    hash_of,
    measure,
    shown_k,
    similarities,
    spread_over,
)
from models.files import Parser, one_line_errors, require_writable, write_json
from models.pipeline import to_uint8
from models.precision import device_name, uses_gpu
from training.data import ImageData
from training.options import add_options, option, read_options

NEIGHBOURS = (10, 20, 200)
MAP_IMAGES, MAP_BLOCKS = 6, 8
MASK_RATIO = 0.75


@dataclass(frozen=True)
class ProbeOptions:
    """Probes."""

    k: str | None = option(None, f"neighbours that vote; {','.join(map(str, NEIGHBOURS))} unless given, where there are as many")
    temperature: float = option(0.07, "of their votes", least=0.001)
    attentive: bool = option(False, "also let a learned query attend to the tokens of the best block")
    finetune: int | None = option(None, "also train a copy of the network end to end, for so many epochs", least=1)
    finetune_learning_rate: float = option(1e-3, "of the block that is read, for 256 images a step", least=0)
    few_shot: str | None = option(None, "also fit the linear probe to these shares of the training labels, such as 0.01,0.1")
    reference_network: str | None = option(None, f"align features with its: {LITE0}, which needs no download, or a network of timm")
    reference_weights: str | None = option(None, "of a reference from timm, as --timm_weights; pretrained unless given")


@dataclass(frozen=True)
class OutputOptions:
    """Output."""

    json: str | None = option(None, "write the numbers with their protocol to this file; OUTPUT/probe.json unless given")
    output: str | None = option(None, "folder for pictures; the checkpoint's eval/ unless given")
    pictures: bool = option(True, "draw them, where there is a folder for them")


GROUPS = (NetworkOptions, DataOptions, LookOptions, ProbeOptions, OutputOptions)


def parser() -> argparse.ArgumentParser:
    """Flags of the command line."""
    flags = Parser(description=__doc__)
    for group in GROUPS:
        add_options(flags, group)
    return flags


# ---------------------------------------------------------------------------------------------------------------- evaluation


def evaluate(network: NetworkOptions, data: DataOptions, options: LookOptions, probes: ProbeOptions) -> tuple[dict[str, Any], Looked]:
    """All numbers and their protocol, as the JSON holds them; and what was looked at."""
    began = time.monotonic()
    asked = numbers(probes.k, int, "--k") if probes.k is not None else ()
    shares = numbers(probes.few_shot, float, "--few_shot") if probes.few_shot else ()
    if not all(0 < each < 1 for each in shares):
        raise ValueError(f"--few_shot is {probes.few_shot}; shares of the training labels lie between 0 and 1, such as 0.01,0.1")
    looked: Looked
    if network.features:
        looked = read_features(network.features)
        check_neighbours(asked, len(looked.labelled.train_y))
    else:
        looked = look(network, data, options, asked, lambda *looked_at: require(probes, *looked_at))
    device = torch.device("cuda" if uses_gpu() else "cpu")
    through = looked if isinstance(looked, LookedThrough) else None  # `check` refuses what features from files cannot give
    reference = None
    if through and probes.reference_network:
        reference = reference_of(probes.reference_network, probes.reference_weights, data, through, options)
    num = len(looked.labelled.train_y)
    ks = asked or tuple(k for k in NEIGHBOURS if k <= num) or (num,)
    probing = time.monotonic()
    rows = measure(looked.labelled, ks, probes.temperature, options.seed, device, reference)
    best = best_row(rows)
    for row in rows:
        if row is not best:
            drop_hits(row)
    place = Place(best["time"], best["block"], best["pooling"])
    extra: dict[str, Any] = {"cka": similarities(looked.labelled, place.time, place.pooling)}
    if shares:
        extra["few_shot"] = few_shot(looked.labelled, place, shares, options.seed, device)
    if through and probes.attentive:
        extra["attentive"] = attend(through, place, options)
    if through and probes.finetune:
        extra["finetune"] = tune(through, place, probes.finetune, probes.finetune_learning_rate, options)
    probes_s = time.monotonic() - probing
    result = {
        "metric": "linear probe accuracy",
        "value": best["linear"]["value"],
        "low": best["linear"]["low"],
        "high": best["linear"]["high"],
        "best": {**place._asdict(), "chosen_by": "linear probe on the held-out part of the training set"},
        "baseline": {"value": baseline(looked.labelled), "what": "always the most frequent class of the training set"},
        "num_samples": len(looked.labelled.test_y),
        **looked.protocol,
        "train_labels": hash_of(looked.labelled.train_y),  # in their order: which images they were, at any resolution
        "test_labels": hash_of(looked.labelled.test_y),
        "k": list(ks),
        "temperature": probes.temperature,
        "neighbours": "cosine, weighted, exact",
        "linear_probe": f"softmax regression on standardised features, {STEPS} steps over all images, weight decay chosen on held-out "
        "parts of the training set (10 % each, runs of neighbours of every class), then fitted to all of it",
        "rank_images": min(RANK_IMAGES, len(looked.labelled.train_y)),  # of the training set, for rank, spectrum and norm
        "similarity_images": min(SIMILARITY_IMAGES, len(looked.labelled.test_y)),  # of the test set, for CKA and CKNNA
        "reference_network": probes.reference_network,
        "cknna_k": CKNNA_K if probes.reference_network else None,
        "seed": options.seed,
        "notes": looked.notes,
        "results": rows,
        **extra,
        "probes_s": round(probes_s, 2),
        "wall_s": round(time.monotonic() - began, 2),
        "device": device_name(),
        "versions": {name: version(name) for name in ("torch", "diffusers", "timm", "numpy", "scikit-learn")},
    }
    return result, looked


def require(probes: ProbeOptions, encoder: Encoder, train: ImageData, test: ImageData) -> None:
    """Raise ValueError, before features are taken, for what could not be done with them in the end."""
    if probes.attentive:
        require_tokens(encoder, train, test)
    if probes.finetune:
        require_pixels(encoder)


def attend(looked: LookedThrough, place: Place, options: LookOptions) -> dict[str, Any]:
    """The attentive probe on the tokens of one block."""
    labelled, block = looked.labelled, block_number(place)
    sides = [
        block_tokens(looked.encoder, side, place.time, block, seed, options.batch_size, options.mixed_precision)
        for side, seed in ((looked.train, options.seed), (looked.test, options.seed + TEST_SEEDS))
    ]
    (held_out,) = held_out_parts(labelled.train_y, parts=1, seed=options.seed)
    probe = attentive_probe(sides[0], labelled.train_y, sides[1], held_out, device=looked.encoder.device, seed=options.seed)
    about = {"time": place.time, "block": block, "learning_rate": probe.chosen, "held_out_accuracy": probe.held_out_accuracy}
    return {**accuracy(probe.predictions, labelled.test_y), **about}


def tune(looked: LookedThrough, place: Place, epochs: int, rate: float, options: LookOptions) -> dict[str, Any]:
    """Fine-tuning: of a diffusion model up to its best block, which is in the middle; of others to the end."""
    encoder = looked.encoder
    block = block_number(place) if isinstance(encoder, DiffusionEncoder) else len(block_shapes(encoder, looked.test)) - 1
    predictions = finetune(
        encoder, looked.train, looked.test, place.time, block, epochs, rate, options.batch_size, options.mixed_precision, options.seed
    )
    about = {"time": place.time, "block": block, "epochs": epochs, "learning_rate": rate, "batch_size": options.batch_size}
    return {**accuracy(predictions, looked.labelled.test_y), **about}


def block_number(place: Place) -> int:
    """Of a network's block; only features from files have names instead."""
    assert isinstance(place.block, int)
    return place.block


# ------------------------------------------------------------------------------------------------------------------ pictures


def draw(folder: Path, looked: Looked, result: dict[str, Any], options: LookOptions) -> None:
    """Write the pictures, one by one."""
    rows, cka, best = result["results"], result["cka"], best_place(result)

    def path(name: str) -> Path:
        return folder / f"probe-{name}.png"

    pictures.draw_accuracies(path("accuracy"), rows)
    pictures.draw_ranks(path("rank"), rows)
    here = "" if best.time is None else f", t = {best.time:g}"
    alike = [row for row in rows if (row["time"], row["pooling"]) == (best.time, best.pooling)]
    pictures.draw_spectra(path("spectrum"), alike, f"spectra ({best.pooling}{here})")
    if cka and len(cka["blocks"]) > 1:
        pictures.draw_cka(path("cka"), cka["blocks"], np.array(cka["matrix"]), f"similarity of blocks ({best.pooling}{here})")
    labelled = looked.labelled
    chosen = spread_over(len(labelled.test_y), pictures.TSNE_IMAGES)
    if len(chosen) > 3:
        x, y = labelled.test[best][chosen], labelled.test_y[chosen].numpy()
        pictures.draw_tsne(path("tsne"), x, y, labelled.class_names, f"t-SNE of test images ({best})")
    if isinstance(looked, LookedThrough):
        few = part_of(looked.test, spread_over(len(looked.test), MAP_IMAGES))
        maps = patch_maps(looked.encoder, few, best.time, options)
        if maps:
            pictures.draw_maps(path("patches"), few.images, maps, f"patches by their three principal components{here}")
        if isinstance(looked.encoder, MAEEncoder):
            # where pixels are normalised, the network says nothing of these two
            own = ",\nbrightness and contrast of each patch from the picture" if looked.encoder.network.config.norm_pixels else ""
            seen, painted = reconstruct(looked.encoder, few)
            pictures.draw_reconstructions(path("reconstructions"), few.images, seen, painted, f"reconstructions{own}")


@torch.no_grad()
def patch_maps(encoder: Encoder, data: ImageData, time: float | None, options: LookOptions) -> dict[str, Tensor]:
    """Patches' tokens (N, T, D) of some blocks, of those whose T is a square of 2 or more."""
    ((_, tokens),) = encoder.blocks(encoder.reader(data)(np.arange(len(data))), options.seed + TEST_SEEDS, (time,))
    patches = {block: x[:, encoder.num_extras :].float().cpu() for block, x in enumerate(tokens)}
    square = [block for block, x in patches.items() if x.shape[1] > 1 and round(x.shape[1] ** 0.5) ** 2 == x.shape[1]]
    return {f"block {square[i]}": patches[square[i]] for i in spread_over(len(square), MAP_BLOCKS)} if square else {}


@torch.no_grad()
def reconstruct(encoder: MAEEncoder, data: ImageData) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (N, H, W, C), twice: what the autoencoder sees of the images, and what it makes of that. The masks are always the same."""
    images = encoder.reader(data)(np.arange(len(data)))
    seen, painted = encoder.network.reconstruct(images, mask_ratio=MASK_RATIO, generator=torch.Generator().manual_seed(0))
    return to_uint8(seen), to_uint8(painted)


# -------------------------------------------------------------------------------------------------------------- command line


def best_place(result: dict[str, Any]) -> Place:
    return Place(*(result["best"][field] for field in Place._fields))


def describe(result: dict[str, Any]) -> str:
    """A table of all places, then a line: the number and its protocol."""
    k = shown_k(result["results"])
    head = ["time", "block", "pooling", f"kNN (k={k})", "linear", "95 %", "ridge", "rank", "exp(rank)", "norm"]
    rows = [head]
    for row in result["results"]:
        percent = [f"{100 * row['linear'][end]:.1f}" for end in ("value", "low", "high")]
        rows.append(
            [
                "" if row["time"] is None else f"{row['time']:g}",
                str(row["block"]),
                row["pooling"],
                f"{100 * row['knn'][k]['value']:.1f}",
                percent[0],
                f"{percent[1]}-{percent[2]}",
                f"{100 * row['ridge']['value']:.1f}",
                *("-" if row[key] is None else f"{row[key]:.2f}" for key in ("rank_entropy", "rank_exponential", "norm")),
            ]
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    for row in result.get("few_shot", ()):
        spread = f"{100 * row['value']:.1f} ± {100 * row['std']:.1f}"
        lines.append(f"linear probe on {100 * row['share']:g} % of the labels ({row['images']} images): {spread}, {FEW_SHOT_DRAWS} draws")
    for key, words in (("attentive", "attentive probe"), ("finetune", "fine-tuned")):
        if key in result:
            value, low, high = (100 * result[key][end] for end in ("value", "low", "high"))
            lines.append(f"{words}: {value:.1f} ({low:.1f}-{high:.1f}), block {result[key]['block']}")
    best = best_place(result)
    line = f"linear probe {100 * result['value']:.1f} % ({100 * result['low']:.1f}-{100 * result['high']:.1f}) | {best}"
    line += f" | the most frequent class alone {100 * result['baseline']['value']:.1f} %"
    source = result["dataset"] or result["features"]
    line += f" | {result['test_num']:,} images of {source}, fitted to {result['train_num']:,}"
    if result["images_seen"] is not None:
        line += f" | {result['images_seen']:,} images seen, alpha_min {result['alpha_min']:g}"
    return "\n".join([*lines, f"{line} | {result['wall_s']:.0f} s on {result['device']}"])


def check(network: NetworkOptions, data: DataOptions, probes: ProbeOptions, output: OutputOptions) -> None:
    """Raise ValueError, before anything is spent, for flags that do not go together."""
    given = [name for name in ("checkpoint", "timm", "features") if getattr(network, name)]
    if len(given) != 1:
        raise ValueError("give one of --checkpoint, --timm and --features")
    if bool(data.dataset) == (given == ["features"]):
        raise ValueError("--features come with their labels; leave --dataset away" if data.dataset else "give --dataset")
    if given == ["features"] and (probes.attentive or probes.finetune or probes.reference_network):
        raise ValueError("--attentive, --finetune and --reference_network need the images; give --checkpoint or --timm")
    if given != ["timm"] and (network.timm_weights or network.resolution):
        raise ValueError("--timm_weights and --resolution are for --timm")
    if probes.reference_weights and not probes.reference_network:
        raise ValueError("--reference_weights are for --reference_network")
    if output.json and Path(output.json).is_dir():
        raise ValueError(f"--json {output.json} is a folder; give a file")
    if output.json:
        require_writable(Path(output.json).parent, "choose another --json")
    if output.output:
        require_writable(Path(output.output), "choose another --output")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parsed = parser().parse_args(arguments)
    with one_line_errors():
        network, data = read_options(parsed, NetworkOptions), read_options(parsed, DataOptions)
        options, probes = read_options(parsed, LookOptions), read_options(parsed, ProbeOptions)
        output = read_options(parsed, OutputOptions)
        if network.checkpoint and not output.output:
            output = replace(output, output=str(Path(network.checkpoint) / "eval"))
        check(network, data, probes, output)
        result, looked = evaluate(network, data, options, probes)
        print("\n".join([describe(result), *(f"note: {note}" for note in result["notes"])]), flush=True)
        target = output.json or (output.output and Path(output.output) / "probe.json")
        if target:
            write_json(target, result)
            print(f"numbers in {target}", flush=True)
        if output.output and output.pictures:
            draw(Path(output.output), looked, result, options)
            print(f"pictures in {output.output}", flush=True)


if __name__ == "__main__":
    main()
