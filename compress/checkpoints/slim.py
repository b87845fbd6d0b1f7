"""Slim checkpoints: a diffusers pipeline folder with new weights."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from compress.checkpoints.exporting import export, load_options
from compress.checkpoints.facts import checkpoint_folder, model_card
from compress.models.licence import licence_files
from compress.models.loading import FREE_WIDTHS
from compress.models.pipelines import condition_of, denoiser

PLAIN = "A plain diffusers pipeline with a smaller denoiser; it needs no extra package:"
OWN_WIDTHS = """\
A diffusers pipeline whose inner widths differ from layer to layer, which no class of diffusers has.
The class comes with the folder, in `{}/{}.py`, and needs diffusers
alone; `trust_remote_code=True` lets diffusers run that file. (`compress.load` runs no code of a
folder: it has the class.)"""
TASKS = {
    "caption": "text-to-image",
    "label": "unconditional-image-generation",
    None: "unconditional-image-generation",
}


def save_slim(
    pipeline: DiffusionPipeline,
    folder: Path,
    facts: Mapping[str, Any],
    *,
    source: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a pipeline folder that plain diffusers loads, with the facts of its making.

    A denoiser with free inner widths has a class of ours, which is written beside its weights:
    diffusers loads it with ``trust_remote_code=True``.

    Parameters
    ----------
    pipeline : with the slim denoiser.
    folder : where to; complete or untouched.
    facts : JSON values: base model and its hash, recipe, widths, metrics.
    source : the folder that all parts but the denoiser were read from; they, and its licence, are
        copied byte by byte. Without it parts are written as diffusers and transformers write them.
    overwrite : replace a checkpoint that is there.
    """
    part, model = denoiser(pipeline)
    free = isinstance(model, FREE_WIDTHS)
    kind = type(pipeline).__name__

    def card(facts: Mapping[str, Any]) -> str:
        widths = [f"- {w['level']}: {w['dense']} -> {w['compressed']}" for w in facts["widths"]]
        arguments = "".join(f", {name}={value}" for name, value in options.items())
        lines = [
            OWN_WIDTHS.format(part, type(model).__module__) if free else PLAIN,
            "",
            "```python",
            *(["import torch"] if "torch_dtype" in options else []),
            f"from diffusers import {kind}",
            "",
            f'pipeline = {kind}.from_pretrained("path/to/this/folder"{arguments})',
            "```",
            "",
            *widths,
        ]
        return model_card(
            facts,
            title=f"{facts.get('base_model', 'A diffusion model')}, pruned",
            library="diffusers",
            task=TASKS[condition_of(pipeline)],
            tags=["pruned"],
            usage="\n".join(lines),
        )

    facts = {"widths": [], **facts}
    options = {"trust_remote_code": "True"} if free else {}
    with checkpoint_folder(folder, "slim", facts, card, overwrite=overwrite) as temporary:
        export(pipeline, temporary, source)
        for path in licence_files(source) if source else ():
            shutil.copy(path, temporary)
        options |= load_options(temporary, pipeline)
    return folder
