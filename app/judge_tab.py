"""Judge: distances and probes of checkpoints as jobs, and a leaderboard of everything that was measured."""

from collections import defaultdict
from collections.abc import Container, Sequence
from typing import Any

import gradio as gr

from app import judging, render
from app.catalog import all_results, sources
from app.job_status import Status
from app.jobs import Jobs
from app.plots import text
from app.site import AS_SENT, LATEST, QUIET, Site, Updates, clears
from app.train_tab import FIELDS, form_errors, unseen
from app.train_view import on_their_way, state_words
from training.images import EMBEDDED

SAME_PROTOCOL = (
    *("metric", "reference", "reference_split", "reference_num", "reference_fingerprint", "feature_extractor", "feature_extractor_weights"),
    *("dataset", "train_num", "test_num", "train_labels", "test_labels", "resolution", "num_samples"),
    *("sampler", "steps", "guidance_scale", "guidance_interval", "guide", "labels", "precision"),
)
HIGHER_IS_BETTER = ("accuracy", "precision", "recall", "IS")
REFRESH_S = 3.0
ABOUT = (
    "Evaluations queue with the trainings, and are stopped under **Train**. "
    "Several checkpoints are compared pairwise, on the same noise. "
    "The first one against a set of images takes minutes longer: that set's features are taken once, and kept."
)


def judge_tab(site: Site, tab: gr.Tab) -> gr.Timer:
    """The widgets of the tab, and what they do; without jobs the leaderboard alone. Returns what looks for new numbers."""
    if site.jobs is not None:
        _form(site, site.jobs, tab)
    running = gr.HTML("", elem_id="evaluations", apply_default_css=False)
    board = gr.HTML("", elem_id="leaderboard", apply_default_css=False)
    timer, seen = gr.Timer(REFRESH_S, active=False), gr.State({})

    def fresh(known: dict[Any, int]) -> Updates:
        """What has changed since."""
        return unseen(dict(zip((running, board), on_their_way_and_found(site), strict=True)), seen, known)

    gr.on([tab.select, timer.tick], fresh, seen, [seen, running, board], **QUIET)
    return timer


def _form(site: Site, jobs: Jobs, tab: gr.Tab) -> None:
    gr.Markdown(ABOUT)
    with gr.Row():
        most = judging.MAX_CHECKPOINTS
        chosen = gr.Dropdown(
            [], value=[], multiselect=True, label="Checkpoints", max_choices=most, scale=3, min_width=260, elem_id="judged"
        )
        measures = [(measure.about, name) for name, measure in judging.MEASURES.items()]
        measure = gr.Dropdown(measures, value="FD", label="Measure", scale=3, min_width=300, elem_id="measure")
        words = "openmoji, or the folder of images that they were trained on"
        reference = gr.Textbox(EMBEDDED, label=FIELDS["reference"], placeholder=words, max_length=500, min_width=220, elem_id="reference")
        number = gr.Number(2048, label="Samples", min_width=110, elem_id="num-samples")
    start = gr.Button("Judge", variant="primary", min_width=140, elem_id="judge")
    told = gr.HTML(render.message(""), elem_id="judge-told")

    def ask(names: list[str], measure: str, reference: str, number: int) -> str:
        with form_errors():
            options = {"measure": measure, "checkpoints": names, "reference": (reference or "").strip(), "num_samples": number}
            status = jobs.judge(options)
        return render.message(f"{judging.title(status.options)}: {state_words(status)}. Its result appears here and in the cards.")

    proposed = gr.State(EMBEDDED)  # what stands there unless the visitor wrote something else

    def propose(names: list[str], reference: str, proposed: str) -> tuple[Any, str]:
        """What the checkpoints were trained on, where that is here."""
        data = {judging.training_data(name, site.runs) for name in names}
        new = data.pop() if len(data) == 1 else EMBEDDED if not names else ""
        return (gr.update(value=new) if reference == proposed else gr.skip()), new

    clears([start.click], told)
    start.click(ask, [chosen, measure, reference, number], told, **AS_SENT)
    chosen.input(propose, [chosen, reference, proposed], [reference, proposed], **LATEST)
    tab.select(lambda: gr.update(choices=list(sources(site.runs))), None, chosen, **QUIET)


def measured(jobs: Jobs | None, names: Container[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """Checkpoints -> what the page's own evaluations found of the weights they have now, the newest first; an empty list for others.

    Args:
        names: of the checkpoints to look at; None takes all. Their weights are read to know them.
    """
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    finished = jobs.evaluations() if jobs else []
    now = sources(jobs.runs) if jobs and finished else {}
    if names is not None:
        finished = [status for status in finished if any(name in names for name in status.options["checkpoints"])]
    for status in finished:
        for name, same, numbers in judging.results_of(status.folder, status.options, now)[0]:
            found[name] += numbers if same else []
    return found


def on_their_way_and_found(site: Site) -> tuple[str, str]:
    """What runs or waits, and the leaderboard; every visitor's page asks every few seconds, so jobs are looked through once for both."""
    if site.jobs is None:
        return "", leaderboard(site)
    statuses = site.jobs.all()
    return on_their_way(site.jobs, statuses), leaderboard(site, statuses)


def leaderboard(site: Site, statuses: Sequence[Status] | None = None) -> str:
    """Every number, those of one protocol in one table, the best first; then what paired comparisons said.

    Args:
        statuses: of all jobs, where they are known already.
    """
    rows = [(name, each) for name, results in all_results(site.runs).items() for each in results]
    differences: list[str] = []
    now = sources(site.runs)
    for status in site.jobs.evaluations(statuses) if site.jobs else ():
        told, said = judging.results_of(status.folder, status.options, now)
        for name, same, numbers in told:
            title = name if same else f"{name} (earlier weights)" if name in now else f"{name} (not here any more)"
            rows += [(title, each) for each in numbers]
        differences += said
    if not rows:
        how = " Choose a checkpoint and press <b>Judge</b>." if site.jobs else ""
        return f'<p class="empty">Nothing is measured yet.{how}</p>'
    tables: dict[tuple[str, ...], list[tuple[str, dict[str, Any]]]] = {}
    for name, result in rows:
        tables.setdefault(tuple(str(result.get(key)) for key in SAME_PROTOCOL), []).append((name, result))
    paired = "".join(f'<p class="result">{text(line)}</p>' for line in dict.fromkeys(differences))
    return "".join(map(_table, tables.values())) + (f"<h3>Paired comparisons</h3>{paired}" if paired else "")


def _table(rows: Sequence[tuple[str, dict[str, Any]]]) -> str:
    metric = str(rows[0][1]["metric"])
    sign = -1 if any(word in metric for word in HIGHER_IS_BETTER) else 1
    ranked = sorted(rows, key=lambda row: sign * row[1]["value"])
    lines = []
    for name, result in ranked:
        low, high = result.get("low"), result.get("high")
        interval = f" [{low:.4g}, {high:.4g}]" if isinstance(low, int | float) and isinstance(high, int | float) else ""
        facts = [f"alpha_min {result.get('alpha_min') or 1:g}", *render.of_a_row(result)]
        lines.append(f"<tr><td>{text(name)}</td><td><b>{result['value']:.4g}</b>{interval}</td><td>{text(', '.join(facts))}</td></tr>")
    shared = {key: value for key, value in ranked[0][1].items() if key not in render.OF_A_ROW}
    note = f'<p class="protocol">{text(render.protocol(shared))}</p>'
    return f"<h3>{text(metric)}</h3>{note}{render.facts_table(('Checkpoint', 'Value (95 %)', ''), lines)}"
