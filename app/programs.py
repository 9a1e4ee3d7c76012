"""The page for programs: named endpoints, documented at its foot."""

import asyncio
import dataclasses
from typing import Any

import gradio as gr

from app.catalog import all_results, card, checkpoints, variants
from app.job_status import Status, progress_of
from app.jobs import Jobs
from app.judge_tab import measured
from app.recipe import of_image
from app.render import png_url
from app.sampler import Frame, sample
from app.settings import NO_LABEL, OWN_SAMPLER, RANDOM_SEED, Comparison
from app.site import Site, page_errors


def programs(site: Site) -> None:
    """Declare the endpoints; each argument is described in one line, where the page's documentation finds it."""

    async def take(names: Any, label: str, session: str, **settings: Any) -> Frame:
        with page_errors():
            if not isinstance(names, list):
                raise ValueError("give the names of the checkpoints as a list")
            asked = Comparison.of_names(names, label=None if label == NO_LABEL else label, **settings)
            return await site.studio.finished(site.studio.ask(lambda: sample(asked, site.runs), session, asked))

    def urls(frame: Frame) -> list[list[str]]:
        sides = enumerate(frame.images)
        return [[png_url(image, of_image(frame.recipe, side, i)) for i, image in enumerate(images)] for side, images in sides]

    async def compare_checkpoints(
        checkpoints: list[str],
        label: str = NO_LABEL,
        seed: int = RANDOM_SEED,
        num_images: int = 8,
        steps: int = 20,
        guidance_scale: float = 2.0,
        sampler: str = OWN_SAMPLER,
        request: gr.Request = None,
    ) -> tuple[list[list[str]], dict]:
        """Sample checkpoints from the same noise; image i comes from seed + i. The same call gives the same images on the same machine.

        Parameters:
            checkpoints: 1 to 4 names of /checkpoints.
            label: name or number of a class, or "no label".
            seed: -1 draws one; the recipe tells which.
            num_images: of each checkpoint, 1 to 64.
            steps: of the sampler, 1 to 250.
            guidance_scale: classifier-free guidance, 0 to 100; 1 is none.
            sampler: euler, heun, dpm++ or unipc; ddim, ddpm, dpm++ or unipc for DDPMs; "own" for each model's own.

        Returns:
            The images of each checkpoint as PNG data URLs (data:image/png;base64,...) with their recipes, and the recipe of all.
        """
        settings = dict(seed=seed, num_images=num_images, steps=steps, guidance_scale=guidance_scale, sampler=sampler)
        frame = await take(checkpoints, label, request.session_hash, **settings)
        return await asyncio.to_thread(urls, frame), frame.recipe

    async def sample_checkpoint(
        checkpoint: str,
        label: str = NO_LABEL,
        seed: int = RANDOM_SEED,
        num_images: int = 8,
        steps: int = 20,
        guidance_scale: float = 2.0,
        sampler: str = OWN_SAMPLER,
        request: gr.Request = None,
    ) -> tuple[list[str], dict]:
        """Sample one checkpoint; arguments and answers are those of /compare.

        Parameters:
            checkpoint: a name of /checkpoints.
            label: name or number of a class, or "no label".
            seed: -1 draws one; the recipe tells which.
            num_images: 1 to 64.
            steps: of the sampler, 1 to 250.
            guidance_scale: classifier-free guidance, 0 to 100; 1 is none.
            sampler: euler, heun, dpm++ or unipc; ddim, ddpm, dpm++ or unipc for DDPMs; "own" for the model's own.

        Returns:
            The images as PNG data URLs with their recipes, and the recipe.
        """
        (images,), recipe = await compare_checkpoints([checkpoint], label, seed, num_images, steps, guidance_scale, sampler, request)
        return images, recipe

    def list_checkpoints() -> list[dict]:
        """Every checkpoint that can be sampled.

        Returns:
            For each: "name", "backbone", "alpha_min", "parameters", "labels", "training", "variants" (names of its other weights) and
            "results" (numbers with their protocol).
        """
        with page_errors():
            told, names, found = [], list(variants(site.runs)), measured(site.jobs)
            known = all_results(site.runs)
            for name, source in checkpoints(site.runs).items():
                try:
                    each, hash = card(name, site.runs), source.hash
                except (ValueError, OSError):
                    continue  # damaged, or just being written; who asks for it is told
                told.append(
                    {
                        "name": name,
                        "backbone": each.backbone,
                        "alpha_min": each.alpha_min,
                        "parameters": each.num_parameters,
                        "labels": list(each.class_names),
                        "training": each.training,
                        "variants": [other for other in names if other.startswith(f"{name} ")],
                        "results": [*known[name], *found[name]],
                        "sha256": hash,
                    }
                )
            return told

    gr.api(compare_checkpoints, api_name="compare", concurrency_limit=None)
    gr.api(sample_checkpoint, api_name="sample", concurrency_limit=None)
    gr.api(list_checkpoints, api_name="checkpoints")
    if site.jobs is not None:
        _trainings(site.jobs)


def _trainings(jobs: Jobs) -> None:
    """The endpoints that change something."""

    def told(status: Status) -> dict:
        fields = {each.name: getattr(status, each.name) for each in dataclasses.fields(status)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items() if name != "folder"}

    def start_training(name: str, options: dict, pair: bool = False) -> list[dict]:
        """Queue a training, or a plain and a decayed one with everything else equal.

        Parameters:
            name: of the run; of a pair NAME-plain and NAME-decayed are made of it.
            options: flags that `training/train_diffusion.py --help` or train_mae.py lists: {"preset": "demo-decayed", "seed": 1}.
            pair: whether it is a pair; the options are the decayed one's.

        Returns:
            For each run what /training tells.
        """
        with page_errors():
            return [told(each) for each in (jobs.start_pair(name, options) if pair else [jobs.start(name, options)])]

    def stop_training(name: str) -> dict:
        """Ask a training to save and leave, or take it out of the queue; an evaluation is ended.

        Parameters:
            name: of the run.

        Returns:
            What /training tells.
        """
        with page_errors():
            return told(jobs.stop(name))

    def resume_training(name: str, max_train_steps: int = 0) -> dict:
        """Queue a training once more, from its last checkpoint.

        Parameters:
            name: of the run.
            max_train_steps: another number of steps in all; 0 leaves it.

        Returns:
            What /training tells.
        """
        with page_errors():
            return told(jobs.resume(name, {"max_train_steps": max_train_steps} if max_train_steps else None))

    def training(name: str) -> dict:
        """How a training or an evaluation stands.

        Parameters:
            name: of the run.

        Returns:
            "name", "kind", "state" (queued, running, stopping, finished, failed, interrupted), "message", "position" in the queue,
            "options", "started_at" (seconds since 1970), "log" of a failed one; "step", "of" and "seconds_left"; "part": what it is
            at besides, as an evaluation always is ("part" in words, "done", "of", "seconds_left"), or null.
        """
        with page_errors():
            status = jobs.status(name)
            progress = progress_of(status, brief=True)
            told_of = {key: getattr(progress, key) for key in ("step", "of", "seconds_left", "part")}
            return {**told(status), **told_of}

    def trainings() -> list[dict]:
        """All runs and evaluations: first those that run, then the queue in its order, then the others.

        Returns:
            For each what /training tells, without its steps.
        """
        with page_errors():
            return [told(each) for each in jobs.all()]

    def judge(checkpoints: list[str], measure: str = "FD", reference: str = "openmoji", num_samples: int = 2048) -> dict:
        """Queue an evaluation.

        Parameters:
            checkpoints: names of /checkpoints; several are compared on the same noise.
            measure: "FD", "KD", "FID" (which downloads Inception once) or "probes" (of one checkpoint).
            reference: "openmoji", or a folder of images.
            num_samples: images of each checkpoint, or to probe with.

        Returns:
            What /training tells; the numbers appear in /checkpoints.
        """
        with page_errors():
            options = {"checkpoints": checkpoints, "measure": measure, "reference": reference, "num_samples": num_samples}
            return told(jobs.judge(options))

    for endpoint in (start_training, stop_training, resume_training, training, trainings, judge):
        gr.api(endpoint, api_name=endpoint.__name__)
