"""Trainings as HTML: the table of all, and the curves of one or two."""

import base64
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from app import judging, render
from app.job_files import CONFIG, EVALUATION, QUEUED, RUNNING, TRAINING, json_of
from app.job_flags import ALL_PRESETS
from app.job_status import Progress, Status, progress_of
from app.jobs import Jobs
from app.plots import Line, plot, text

NO_RUN = '<p class="empty small">No run yet. Give one a name, choose a preset, and press <b>Start</b>.</p>'
NO_CURVES = '<p class="empty small">Curves begin with the first logged step.</p>'


def title_of(status: Status) -> str:
    """What people call a job; evaluations have no name, and one may be asked for again."""
    if status.kind != EVALUATION:
        return status.name
    began = f", {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(status.started_at))}" if status.started_at else ""
    return f"{judging.title(status.options)}{began}"


def state_words(status: Status) -> str:
    """In words, with the place of one that waits."""
    return f"place {status.position} in the queue" if status.state == QUEUED else status.state


def possible(status: Status | None) -> set[str]:
    """What can be done with a run: names of methods of `Jobs`."""
    if status is None:
        return set()
    if status.active:
        return {"stop"}
    return {"delete", "resume", "rename", "archive"} if status.kind == TRAINING else {"delete"}


def time_words(seconds: float) -> str:
    """A time, roughly."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def overview_of(jobs: Jobs, statuses: Sequence[Status]) -> str:
    """All runs in one table."""
    if not statuses:
        return NO_RUN
    rows = []
    for status in statuses:
        progress, done = progress_of(status, brief=True), ""
        if status.kind == TRAINING:
            done = f"step {progress.step:,}" + (f" of {progress.of:,}" if progress.of else "")
            if status.state == RUNNING and progress.seconds_left is not None:
                done += f", {time_words(progress.seconds_left)} left"
        if progress.part:
            done += f"{done and '; '}{part_words(progress.part)}"
        rows.append(
            f"<tr><td>{text(title_of(status))}</td><td>{_badge(status)}</td><td>{text(done)}</td><td>{text(status.message)}</td></tr>"
        )
    return render.facts_table(("Run", "State", "How far", ""), rows)


def _badge(status: Status) -> str:
    return f'<span class="state {status.state}">{state_words(status)}</span>'


def part_words(part: dict[str, Any]) -> str:
    """What a process is at, and how far."""
    of = f" of {part['of']:,}" if part["of"] else ""
    left = f", {time_words(part['seconds_left'])} left of this part" if part["seconds_left"] is not None else ""
    return f"{part['part']}: {part['done']:,}{of}{left}"


def part_of(progress: Progress) -> str:
    """The same with a bar; nothing between two parts."""
    if progress.part is None:
        return ""
    bar = f'<progress max="{progress.part["of"] or 1}" value="{progress.part["done"]}" aria-label="This part"></progress>'
    return f'<div class="status">{bar if progress.part["of"] else ""}<span>{text(part_words(progress.part))}</span></div>'


def on_their_way(jobs: Jobs, statuses: Sequence[Status]) -> str:
    """Evaluations that run or wait, and how far they are."""
    told = []
    for status in statuses:
        if status.kind == EVALUATION and status.active:
            title = f"<b>{text(title_of(status))}</b> {_badge(status)}"
            told.append(f'<p class="result">{title}</p>{part_of(progress_of(status, brief=True))}')
    return f"<h3>On their way</h3>{''.join(told)}" if told else ""


def details_of(jobs: Jobs, status: Status | None, other: Status | None) -> str:
    """Curves, newest samples and last words of a run, and the curves of another one beside them."""
    if status is None:
        return ""
    progress = progress_of(status)
    log = "\n".join(progress.log[-12:])
    # open: Gradio puts each new version into the old one's elements, and would close at every look what the visitor opened
    words = f'<p class="protocol">Last lines of its log</p><pre class="log">{text(log) or "nothing yet"}</pre>'
    if status.kind == EVALUATION:
        found, differences = judging.read_results(status.folder, status.options)
        names = status.options["checkpoints"]
        lines = [f"{text(name)}: {render.result_words(each)}" for name, numbers in zip(names, found, strict=False) for each in numbers]
        lines += map(text, differences)
        told = "".join(f'<p class="result">{line}</p>' for line in lines)
        return f'<h3>{text(title_of(status))}</h3><p class="status">{text(status.message)}</p>{part_of(progress)}{told}{words}'
    bar = f'<progress max="{progress.of}" value="{progress.step}" aria-label="Training"></progress>' if progress.of else ""
    facts = [f"step {progress.step:,}" + (f" of {progress.of:,}" if progress.of else "")]
    facts += [f"{progress.images_per_s:.0f} images/s"] if progress.images_per_s else []
    facts += [f"{time_words(progress.seconds_left)} left"] if progress.seconds_left is not None else []
    facts += [text(status.message)]
    runs = [(status.name, progress), *([(other.name, progress_of(other))] if other else [])]
    colours = _colours([status.folder, *([other.folder] if other else [])])
    curves = f'<div class="plots">{_curves(runs, colours)}</div>' if any(each.curve for _, each in runs) else NO_CURVES
    samples = "".join(_sample(name, each) for name, each in runs)
    stands = f'<div class="status">{bar}<span>{" · ".join(facts)}</span></div>{part_of(progress)}'
    return f"<h3>{text(status.name)}</h3>{_settings(status)}{stands}{curves}{samples}{_next_sample(status, progress)}{words}"


def _settings(status: Status) -> str:
    """What was asked for: a run that waits, or failed early, is known by nothing else."""
    told = ", ".join(f"{name} {value}" for name, value in status.options.items())
    return f'<p class="protocol">{text(told)}</p>' if told else ""


def _next_sample(status: Status, progress: Progress) -> str:
    """When the first grid of samples comes, where there is none yet."""
    preset = ALL_PRESETS.get(status.options.get("preset", ""))
    every = {**(preset.flags if preset else {}), **status.options, **json_of(status.folder / CONFIG)}.get("sample_steps")
    if progress.sample is not None or not status.active or not isinstance(every, int):
        return ""
    when = f"come every {every:,} steps; the first at step {every:,}" if every else "are switched off (sample_steps 0)"
    return f'<p class="protocol">Samples {when}.</p>'


def _colours(folders: Sequence[Path]) -> Sequence[int]:
    """One for the plain run and one for the decayed, whichever was chosen first; two of a kind have both."""
    kinds = [0 if json_of(folder / CONFIG).get("alpha_min") == 1 else 1 for folder in folders]
    return kinds if len(set(kinds)) == len(kinds) else (0, 1)


def _curves(runs: Sequence[tuple[str, Progress]], colours: Sequence[int]) -> str:
    """Loss, speed, rank, norms and quick looks of one or two runs."""

    def lines(key: str, scale: float = 1) -> list[Line]:
        def value(line: dict[str, Any]) -> float | None:
            return None if line.get(key) is None else scale * line[key]

        return [
            Line(name, _steps(run), [value(each) for each in run.curve], colour) for colour, (name, run) in zip(colours, runs, strict=True)
        ]

    norms = []
    for colour, (name, run) in zip(colours, runs, strict=True):
        blocks = max((len(each.get("block_norms") or ()) for each in run.curve), default=0)
        for block in range(blocks):
            values = [(each.get("block_norms") or [None] * blocks)[block] for each in run.curve]
            norms.append(Line(name if block == blocks - 1 else "", _steps(run), values, colour, faint=block < blocks - 1))
    return (
        plot(lines("loss"), "Loss", "step")
        + plot(lines("images_per_s"), "Images a second", "step", low=0.0)
        + plot(lines("effective_rank"), "Effective rank (entropy) of the middle", "step")
        + plot(norms, "Norm of every block, the last one strong", "step", logarithmic=True)
        + plot(lines("fd"), "Fréchet distance of a quick look", "step")
        + plot(lines("probe_knn", 100), "kNN of a quick look, % right", "step")
        + plot(lines("probe_linear", 100), "Linear probe of a quick look, % right", "step")
    )


def _steps(run: Progress) -> list[int]:
    return [line["step"] for line in run.curve]


def _sample(name: str, progress: Progress) -> str:
    if progress.sample is None:
        return ""
    try:
        url = "data:image/png;base64," + base64.b64encode(progress.sample.read_bytes()).decode()
    except OSError:
        return ""
    step = progress.sample.stem.removeprefix("step-")
    what = text(f"{name}, step {step}")
    return f'<figure class="samples"><figcaption>{what}</figcaption><img src="{url}" alt="Samples of {what}"></figure>'
