"""The page for programs: named endpoints, documented at its foot."""

from typing import Any

import gradio as gr

from app.catalog import card, checkpoints, results, variants
from app.recipe import of_image
from app.render import NO_LABEL, png_url
from app.sampler import Frame, sample
from app.settings import OWN_SAMPLER, RANDOM_SEED, Comparison
from app.site import Site, page_errors


def programs(site: Site) -> None:
    """Declare the endpoints."""

    async def take(names: Any, label: str, session: str, **settings: Any) -> Frame:
        with page_errors():
            if not isinstance(names, list):
                raise ValueError("give the names of the checkpoints as a list")
            asked = Comparison.of_names(names, label=None if label == NO_LABEL else label, **settings)
            return await site.studio.finished(site.studio.ask(lambda: sample(asked, site.runs), session, asked))

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
        sides = enumerate(frame.images)
        return [[png_url(image, of_image(frame.recipe, side, i)) for i, image in enumerate(images)] for side, images in sides], frame.recipe

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
            told, names = [], list(variants(site.runs))
            for name, source in checkpoints(site.runs).items():
                try:
                    each = card(name, site.runs)
                except ValueError:
                    continue  # damaged; who asks for it is told
                told.append(
                    {
                        "name": name,
                        "backbone": each.backbone,
                        "alpha_min": each.alpha_min,
                        "parameters": each.num_parameters,
                        "labels": list(each.class_names),
                        "training": each.training,
                        "variants": [other for other in names if other.startswith(f"{name} ")],
                        "results": results(name, site.runs),
                        "sha256": source.hash,
                    }
                )
            return told

    gr.api(compare_checkpoints, api_name="compare", concurrency_limit=None)
    gr.api(sample_checkpoint, api_name="sample", concurrency_limit=None)
    gr.api(list_checkpoints, api_name="checkpoints")
