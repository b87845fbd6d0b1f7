"""The fixation on a page and the calibration, as figures in the sections of a report."""

import io
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw

from compress.common.files import image_png
from compress.common.plots import COMPRESSED, DENSE, Plot, canvas, styled
from compress.methods.base import Figure, Section, Shown
from compress.methods.fastocr.trace import trace
from compress.models.page_pictures import KEPT, NO_PLACES, beside, panels_caption, tokens_on_page
from compress.models.visual import (
    ViewOnPage,
    VisualLayout,
    adapter_for,
    build_prompt,
    inputs_for,
    views_on_page,
    visual_layouts,
)

if TYPE_CHECKING:
    from compress.methods.fastocr.method import FastOCR

TITLE = "What fastocr did"
NEW_TOKENS = 200  # of the page in the film
FRAMES, FRAME_MS = 48, 160
STRIP = 6


def sections(method: "FastOCR", shown: Shown) -> list[Section]:
    """The fixation on the page while it is written, over what other methods left of it."""
    model, processor, image = shown.model, shown.processor, shown.image
    text = adapter_for(model.config).read_prompt if shown.prompt is None else shown.prompt
    inputs = build_prompt(model, processor, [image], [text])
    inputs = inputs_for(model, inputs)
    [whole] = visual_layouts(model, inputs)
    views = views_on_page(model, processor, image, whole.grid)
    if not views:
        return [Section(TITLE, [f"The fixation has no figure: {NO_PLACES}"])]
    with ExitStack() as others:
        for other in shown.others:
            others.enter_context(other.attach(model))
        ids, layout, fixations = trace(method, model, inputs, NEW_TOKENS)
    letters = [processor.batch_decode(i, skip_special_tokens=True)[0] for i in ids[1:, None, None]]
    caption = "The fixation while the page is written"
    if shown.others:
        caption += f", on the tokens that {' and '.join(o.name for o in shown.others)} left of it"
    if not (frames := fixation_frames(image, views, layout, fixations, letters)):
        return [Section(TITLE, [f"{caption}: every step of so short an answer reads all tokens"])]
    caption = f"{caption}; {panels_caption(views, whole.grid)}"
    strip = [frames[round(k * (len(frames) - 1) / (STRIP - 1))] for k in range(STRIP)]
    figures = [
        Figure("strip", image_png(beside(strip)), caption, "wide"),
        Figure("film", film(frames), f"{caption}, moving"),
    ]
    return [Section(TITLE, figures=figures)]


def fixation_frames(
    image: Image.Image,
    views: Mapping[int, ViewOnPage],
    layout: VisualLayout,
    fixations: Sequence[torch.Tensor | None],
    letters: Sequence[str],
) -> list[Image.Image]:
    """The fixation moving over a page as its text is written; none where all tokens are read.

    Parameters
    ----------
    image : the page.
    views : where its visual tokens look; not empty.
    layout : of the prompt that the decoder read.
    fixations : visual tokens read in each decode step; None where all were.
    letters : what each of these steps wrote.
    """
    steps = [(step, tokens) for step, tokens in enumerate(fixations) if tokens is not None]
    frames = []
    for step, tokens in steps[:: max(1, len(steps) // FRAMES)]:
        picture = tokens_on_page(image, views, [(layout.grid[tokens], KEPT)])
        written = "".join(letters[: step + 1]).replace("\n", " ")[-34:]
        frame = Image.new("RGB", (picture.width, picture.height + 26), "white")
        frame.paste(picture, (0, 0))
        ImageDraw.Draw(frame).text((6, picture.height + 6), written, fill="black", font_size=15)
        frames.append(frame)
    return frames


def film(frames: Sequence[Image.Image]) -> bytes:
    """Frames as an animated GIF file."""
    target = io.BytesIO()
    frames[0].save(
        target, format="GIF", save_all=True, append_images=frames[1:], duration=FRAME_MS, loop=0
    )
    return target.getvalue()


def calibration_sections(facts: Mapping[str, Any]) -> list[Section]:
    """Which layers are dense or focal, why, and what each of them reads."""
    caption = "Calibration: recall between layers, and by the number of focal layers"
    figure = Figure("recall", recall_plot(facts), caption, "wide")
    return [Section("Dense and focal layers", layer_notes(facts), [figure])]


def layer_notes(facts: Mapping[str, Any]) -> list[str]:
    """What a calibration found, layer by layer, in words.

    Parameters
    ----------
    facts : of :class:`compress.methods.fastocr.calibration.Calibration`.
    """
    roles = dict.fromkeys(facts["dense_layers"], ", dense")
    roles |= dict.fromkeys(facts["focal_layers"], ", focal")
    shares = zip(facts["focus"], facts["attended_by_layer"], strict=True)
    layers = [
        f"layer {n}{roles.get(n, '')}: {focus:.0%} and {read:.0%}"
        for n, (focus, read) in enumerate(shares)
    ]
    notes = [
        "Share of each layer's attention over visual tokens that lies on its own choice, and of "
        f"the visual tokens that it then reads: {'; '.join(layers)}. {facts['attended']:.1%} are "
        f"read in all. Where dense_layers is auto, layers with less than {facts['min_focus']:.0%} "
        "on their own choice are dense."
    ]
    if facts["losses"]:
        rounds = [
            ", ".join(f"layer {n} {loss:.4f}" for n, loss in enumerate(tried) if loss is not None)
            for tried in facts["losses"]
        ]
        notes.append(
            "Focal layers were added by the loss, mean -log p of the dense model's answers under "
            f"the method: {'; then '.join(rounds)}."
        )
    return notes


@styled
def recall_plot(calibration: Mapping[str, Any]) -> Plot:
    """The recall matrix, and the curve of recall against the number of focal layers."""
    figure = canvas(11, 4.2)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
    recall = np.array(calibration["recall"])
    shown = left.imshow(recall, cmap="viridis", vmin=0, vmax=1)
    left.grid(visible=False)
    left.set(title="Attention kept", xlabel="layer that attends", ylabel="layer that chooses")
    figure.colorbar(shown, ax=left, fraction=0.046)
    curve = calibration["curve"]
    right.plot(range(1, len(curve) + 1), curve, "o-", color=DENSE)
    count = min(len(calibration["focal_layers"]), len(curve))
    right.plot([count], [curve[count - 1]], "o", color=COMPRESSED, markersize=10)
    right.set(
        title=f"Recall of top-{calibration['keep_visual']:.0%} by focal layers",
        xlabel="focal layers",
        ylabel="mean recall",
        ylim=(0, 1.02),
    )
    return figure
