"""The report of a run on a diffusion model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from compress.common.files import image_png
from compress.methods.base import Figure, Section, WeightMethod
from compress.reports.html import drawn, write_page
from compress.reports.run_folder import Run, read_run

GRID = 8  # samples in a row


def write_report(folder: Path, method: WeightMethod) -> Path:
    """Draw a run's figures, and write ``report.html`` with the PNGs in ``figures/``.

    What a run does not have (masks, for a one-shot method) is left out.

    Parameters
    ----------
    folder : of a finished run, with metrics.json; recipe.yaml, log.jsonl, trace.safetensors and
        samples.safetensors are used where they are.
    method : of the run.

    Returns
    -------
    Path : the page.
    """
    run = read_run(Path(folder))
    return write_page(
        run.folder,
        run.metrics,
        " of ".join(str(part) for part in (method.label(), run.recipe.get("model")) if part),
        _line(run, method),
        lead=_lead(run.metrics["metrics"], method),
        sections=[*_samples(run), *drawn(lambda: method.sections(run))],
        recipe=run.recipe_text,
    )


def _line(run: Run, method: WeightMethod) -> list[str]:
    knobs = method.model_dump()
    parts = {
        "data": run.recipe.get("data"),
        "criterion": knobs.get("criterion"),
        "process": knobs.get("process"),
        "seed": run.metrics.get("run", {}).get("seed"),
    }
    return [f"{label} {value}" for label, value in parts.items() if value is not None]


def _lead(metrics: Mapping[str, Any], method: WeightMethod) -> str:
    macs = metrics.get("macs", {}).get("ratio")
    if macs is None:
        return ""
    return f"Keeps {macs:.1%} of the dense model’s MACs (requested: {method.keep_macs:.0%})."


def _samples(run: Run) -> list[Section]:
    figures = [
        Figure(f"samples_{side}", sample_grid(run.samples[side]), side.capitalize(), "pixels")
        for side in ("dense", "compressed")
        if side in run.samples
    ]
    return [Section("Samples, from the same noise", figures=figures)] if figures else []


def sample_grid(images: np.ndarray) -> bytes:
    """Tile the first 64 images, uint8 ``(n, channels, height, width)``, eight a row, as a PNG."""
    chosen = images[: GRID * GRID]
    count, channels, height, width = chosen.shape
    rows = -(-count // GRID)
    tiles = np.full((rows * (height + 1) + 1, GRID * (width + 1) + 1, channels), 255, np.uint8)
    for index, image in enumerate(chosen):
        top, left = 1 + index // GRID * (height + 1), 1 + index % GRID * (width + 1)
        tiles[top : top + height, left : left + width] = image.transpose(1, 2, 0)
    picture = Image.fromarray(tiles[..., 0] if channels == 1 else tiles)
    # small images only: large ones are legible as they are
    scale = max(1, min(4, 1200 // picture.width))
    size = picture.width * scale, picture.height * scale
    return image_png(picture.resize(size, Image.Resampling.NEAREST), optimize=True)
