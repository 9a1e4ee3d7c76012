"""What eval/probe.py found in several networks, side by side: a table, curves, and who is better where the intervals say so."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from eval.intervals import LEVEL, difference, share, verdict
from eval.measure import unpacked
from eval.pictures import draw_side_by_side
from eval.report import Section, as_text, loss_curves, paragraph, probe_curves, rank_curves, table, write_report
from models.files import read_json, write_json
from training.checkpoint import CONFIG
from training.monitor import read_metrics

SAMPLES = "fd"  # where a campaign's result tells of samples
RESULT = Path("eval") / "probe.json"  # in a run
METRIC = "linear probe accuracy"  # what marks such a file
# What two results must share to stand in one column; the labels, in their order, tell the images at any resolution ...
COMPARABLE = ("train_labels", "test_labels", "temperature")
# ... but not which images were drawn of a class; earlier versions did not say
DRAWN = "drawn"
# ... and what they should
NOTED = ("dataset", "resolution", "precision", "crop", "seed", "ema", "blocks", "pooling", "times", "reference_network")
TUNED = ("learning_rate", "batch_size")  # of fine-tuning
TRAINED = ("seed", "learning_rate", "images_a_step", "max_train_steps", "data_fingerprint")  # of the trainings themselves
ABOUT = (
    "Differences with their 95 % intervals over the test images, each for itself; another training seed, or another block, would "
    "move them too."
)


@dataclass(frozen=True)
class Probed:
    """One network's result.

    Attributes:
        name: as the user wrote it.
        run: its folder, if there is one.
        result: what the file holds.
        training: what the network was trained with, as far as it is told.
        compared: the file that holds the paired differences of samples of a campaign's arms of one seed, if these were measured.
    """

    name: str
    run: Path | None
    result: dict[str, Any]
    training: Mapping[str, Any] = field(default_factory=dict)
    compared: str | None = None

    @property
    def best(self) -> dict[str, Any]:
        """The row of the place that was chosen on held-out training images."""
        chosen = self.result["best"]
        return next(row for row in self.result["results"] if all(row[key] == chosen[key] for key in ("time", "block", "pooling")))

    @property
    def line(self) -> list[dict[str, Any]]:
        """The rows of all blocks at the best time and pooling."""
        best = self.best
        return [row for row in self.result["results"] if (row["time"], row["pooling"]) == (best["time"], best["pooling"])]

    @property
    def accuracies(self) -> dict[str, dict[str, Any]]:
        """Every accuracy of the best place by its name."""
        best = self.best
        found = {"linear probe": best["linear"], **{f"kNN, k = {k}": each for k, each in best["knn"].items()}, "ridge": best["ridge"]}
        tuned, more = self.result.get("finetune"), {"attentive probe": self.result.get("attentive")}
        if tuned:  # longer is better, so only those of one length stand in one column
            more[f"fine-tuned, {tuned['epochs']} epochs"] = tuned
        return {**found, **{name: each for name, each in more.items() if each}}


def probes_of(path: str) -> dict[str, Any] | None:
    """What eval/probe.py found in a contender: in a run or a folder of probes, or in the file itself, which may be a campaign's; None if
    there is nothing."""
    return _probes_in(_read(path))


def _probes_in(found: Mapping[str, Any]) -> dict[str, Any] | None:
    return next((part for part in (found, found.get("probe")) if isinstance(part, dict) and part.get("metric") == METRIC), None)


def _read(path: str) -> dict[str, Any]:
    """What the file of `probes_of` holds; nothing if there is none."""
    file = Path(path)
    if file.is_dir():  # a run, or what --output of eval/probe.py named
        file = next((found for found in (file / RESULT, file / RESULT.name) if found.is_file()), file)
    found = read_json(file) if file.suffix == ".json" and file.is_file() else {}
    return found if isinstance(found, dict) else {}


def _training_of(path: str, held: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of a run, or of a campaign's result; nothing where neither is told."""
    config = Path(path) / CONFIG
    found = read_json(config) if config.is_file() else held.get("config")
    return found if isinstance(found, dict) else {}


def read_probed(paths: Sequence[str]) -> list[Probed]:
    """The results of several networks.

    Raises:
        ValueError: no result there, results that lack something or are not comparable, and why.
    """
    entries = []
    for path in dict.fromkeys(paths):
        held = _read(path)
        result = _probes_in(held)
        if result is None:
            raise ValueError(f"{path} holds no result of eval/probe.py; probe it first, or give --reference to compare images")
        missing = {*COMPARABLE, "best", "results"} - set(result)
        if missing:
            raise ValueError(f"{path} lacks {', '.join(sorted(missing))}; probe again with this version")
        run = Path(path) if Path(path).is_dir() else None
        compared = f"{held.get('comparison')}/compared-{held.get('seed')}.json" if SAMPLES in held else None
        entries.append(Probed(path, run, result, _training_of(path, held), compared))
    for one, other in pairwise(entries):
        sides = {key: (one.result.get(key), other.result.get(key)) for key in (*COMPARABLE, DRAWN)}
        differ = [f"{key} {ours} and {theirs}" for key, (ours, theirs) in sides.items() if ours != theirs]
        if differ:
            raise ValueError(f"{one.name} and {other.name} were not probed with the same images and settings: {'; '.join(differ)}")
    return entries


def compare(entries: Sequence[Probed]) -> list[dict[str, Any]]:
    """Every network against the first one, each at its own best place: a row for each accuracy that both have.

    The same test images were asked for both, so the interval is that of the paired difference.
    """
    first, rows = entries[0], []
    for entry in entries[1:]:
        for name, found in entry.accuracies.items():
            if name not in first.accuracies:
                continue
            ours, theirs = (share(unpacked(each["hits"], entry.result["test_num"])) for each in (found, first.accuracies[name]))
            change = difference(ours, theirs)
            low, high = change.interval()
            about = {"contender": entry.name, "against": first.name, "metric": name, "difference": change.value}
            rows.append({**about, "low": low, "high": high, "level": LEVEL, "verdict": verdict(low, high, lower_is_better=False)})
    return rows


# -------------------------------------------------------------------------------------------------------------------- words


def number_rows(entries: Sequence[Probed]) -> list[dict[str, str]]:
    """A row for each network: where its features are best, and how good they are there, in %."""
    names = dict.fromkeys(name for entry in entries for name in entry.accuracies)
    shares = dict.fromkeys(each["share"] for entry in entries for each in entry.result.get("few_shot", ()))
    rows = []
    for entry in entries:
        best, result = entry.best, entry.result
        few = {each["share"]: f"{100 * each['value']:.1f} ± {100 * each['std']:.1f}" for each in result.get("few_shot", ())}
        rows.append(
            {
                "contender": entry.name,
                "images seen": _plain(result["images_seen"], ",d"),
                "alpha_min": _plain(result["alpha_min"], "g"),
                "time": _plain(best["time"], "g"),
                "block": str(best["block"]),
                "pooling": best["pooling"],
                **{name: _percent(entry.accuracies.get(name)) for name in names},
                **{f"{100 * each:g} % of the labels": few.get(each, "") for each in shares},
                "rank": _plain(best["rank_entropy"], ".2f"),
                "silhouette": _plain(best["silhouette"], ".3f"),
                "CKNNA": _plain(best.get("cknna"), ".3f"),
            }
        )
    return rows


def difference_rows(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The differences, in points, to read."""
    return [
        {
            "contender": row["contender"],
            "metric": row["metric"],
            "difference": _percent(row, "difference", "+.1f"),
            "verdict": row["verdict"],
        }
        for row in rows
    ]


def protocol_line(entries: Sequence[Probed]) -> str:
    """What all share."""
    result = entries[0].result
    line = f"accuracies in %, of {result['test_num']:,} test images of {result['dataset'] or 'saved features'}, fitted to "
    line += f"{result['train_num']:,}; each network at its own best place, chosen on held-out training images"
    return f"{line} by the linear probe; temperature {result['temperature']:g}"


def notes_of(entries: Sequence[Probed]) -> list[str]:
    """What should be equal and is not, and what each result has noted."""
    results = [entry.result for entry in entries]
    tuned = [result["finetune"] for result in results if "finetune" in result]
    trained = [entry.training for entry in entries if entry.training]
    kinds = ((NOTED, results, ""), (TUNED, tuned, " of fine-tuning"), (TRAINED, trained, " of training"))
    notes = []
    for key, several, about in ((key, several, about) for keys, several, about in kinds for key in keys):
        values = list(dict.fromkeys(str(each.get(key)) for each in several))
        if len(values) > 1:
            notes.append(f"not all have the same {key}{about}: {', '.join(values)}")
    if len(entries) > 1 and len(compared := {entry.compared for entry in entries}) == 1 and (file := compared.pop()):
        notes.append(f"their samples were measured, too: {file} holds the paired differences, and python -m eval.tables shows them")
    return [*notes, *(f"{entry.name}: {note}" for entry in entries for note in entry.result["notes"])]


def _plain(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _percent(found: Mapping[str, Any] | None, key: str = "value", form: str = ".1f") -> str:
    if found is None:
        return ""
    value, low, high = (format(100 * found[end], form) for end in (key, "low", "high"))
    return f"{value} [{low}, {high}]"


# ------------------------------------------------------------------------------------------------------------------ command


def compare_probes(paths: Sequence[str], output: str | None) -> None:
    """Read what was probed, print it side by side, and write a page of it to the folder `output`, if there is one.

    Raises:
        ValueError: as `read_probed`.
    """
    entries = read_probed(paths)
    rows, notes = compare(entries), notes_of(entries)
    print(as_text(number_rows(entries)))
    if rows:
        print(f"\nagainst {entries[0].name}, in points:\n{as_text(difference_rows(rows))}")
    print("\n".join(["", protocol_line(entries), *(f"note: {note}" for note in notes)]))
    if output:
        _write(Path(output), entries, rows, notes)
        print(f"open {Path(output) / 'comparison.html'}")


def _write(folder: Path, entries: Sequence[Probed], rows: Sequence[dict[str, Any]], notes: Sequence[str]) -> None:
    """comparison.json, comparison.html and its picture."""
    write_json(folder / "comparison.json", {"entries": [{"name": entry.name, **entry.result} for entry in entries], "differences": rows})
    draw_side_by_side(folder / "probes.png", {entry.name: (entry.line, entry.best) for entry in entries})
    sections = [Section("Numbers", table(number_rows(entries)) + paragraph(protocol_line(entries)))]
    if rows:
        sections.append(Section(f"Against {entries[0].name}", table(difference_rows(rows))))
    sections.append(Section("By block, at each one's best time and pooling", '<img src="probes.png" alt="Curves over blocks">'))
    runs = {entry.name: entry.run for entry in entries if entry.run and read_metrics(entry.run)}
    if runs:
        curves = loss_curves(runs, "loss of the training") + rank_curves(runs, "effective rank of the most abstract block, in the training")
        curves += probe_curves(runs, "kNN accuracy on some of the training images")
        curves += probe_curves(runs, "accuracy of a linear probe on some of the training images", "probe_linear")
        sections.append(Section("While they were trained", curves))
    sections.append(Section("Notes", "".join(f"<p>{html.escape(note)}</p>" for note in notes)))
    write_report(folder / "comparison.html", "Features side by side", ABOUT, sections)
