"""Drop patches of pages before the encoder of a running model until a context is left."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from compress.common.stages import stage
from compress.methods.pixelprune.encoder import FAMILIES, encoder_arguments, unit_pixels
from compress.methods.pixelprune.pages import PrunedPage
from compress.methods.pixelprune.prediction import kept_units
from compress.models.prompt_pruning import Choice, Prompt, PromptPruning, PrunedPages
from compress.models.visual import ADAPTERS, adapter_for
from compress.models.vlm import load_processor_of

if TYPE_CHECKING:
    from compress.methods.pixelprune.method import PixelPrune

SAM = "whose encoder begins with SAM, windows and convolutions over the whole grid"
NOT_SERVED = {
    "deepseek_ocr2": SAM,
    "got_ocr2": SAM,
    "internvl": "whose encoder takes tiles of one size",
    "paddleocr_vl": "which merges patches by their place in the whole grid",
    "unlimited_ocr": SAM,  # DeepSeek-OCR is one, too
}


@contextmanager
def attached(method: "PixelPrune", model: Any) -> Iterator[PrunedPages]:
    """:meth:`PixelPrune.attach`."""
    kind = model.config.model_type
    if kind not in FAMILIES:
        names = ", ".join(ADAPTERS[family].name for family in FAMILIES)
        reason = NOT_SERVED.get(kind, "whose encoder may need the whole grid")
        raise ValueError(
            f"PixelPrune drops patches where the encoder takes any sequence of them ({names}); got "
            f"{adapter_for(model.config).name} (model_type={kind!r}), {reason}; choose a model of "
            "these"
        )
    pages = _Pages(method, model)
    pruning = PromptPruning(type(method).__name__, model, pages._encode, pages.choose)
    with pruning.attached():
        yield pages.handle


def _std(method: "PixelPrune", model: Any) -> Sequence[float] | None:
    """What differences of normalised pixels are multiplied with, by channel."""
    if method.threshold == 0:
        return None
    if method.image_std != "auto":
        return method.image_std
    if not model.name_or_path:
        raise ValueError(
            "a threshold above 0 is a difference of pixels, so PixelPrune has to know by what the "
            "model's processor divides them; this model was loaded from no folder that says so; "
            "give image_std, the one of its image processor"
        )
    images = load_processor_of(model.name_or_path).image_processor
    return tuple(images.image_std) if images.do_normalize else None


class _Pages:
    """The pages that one attached method prunes."""

    def __init__(self, method: "PixelPrune", model: Any) -> None:
        self.method = method
        self.model = model
        self.handle = PrunedPages("units", "kept")
        self.std = _std(method, model)

    def _encode(
        self, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> tuple[Any, Sequence[PrunedPage]]:
        """The output of ``get_image_features`` of the units that stay, 0 for the others."""
        call = inspect.signature(original).bind(*args, **kwargs).arguments
        pixels, grid = call["pixel_values"], call["image_grid_thw"]
        encoder = self.model.model.visual
        with stage("selection"):
            pages, kept = self._pruned(pixels, grid)
            arguments = encoder_arguments(self.model.config.model_type, encoder, grid, kept)
            patches = pixels[kept.repeat_interleave(encoder.spatial_merge_size**2)]

        def whole(features: torch.Tensor) -> torch.Tensor:
            every = features.new_zeros(len(kept), features.shape[1])
            every[kept] = features
            return every

        def spread(module: Any, args: Any, output: Any) -> None:
            output.pooler_output = whole(output.pooler_output)
            if hasattr(output, "deepstack_features"):
                output.deepstack_features = [whole(layer) for layer in output.deepstack_features]

        # behind the encoder features are cut by the sizes of the images, and put where the prompt
        # has places for all: those that were dropped leave it before the decoder
        with encoder.register_forward_hook(spread):
            output = original(patches, grid, **call.get("kwargs", {}), **arguments)
        self.handle.pages += pages
        return output, pages

    def _pruned(
        self, pixels: torch.Tensor, grid: torch.Tensor
    ) -> tuple[list[PrunedPage], torch.Tensor]:
        """What stays of each page, and which units of all of them, ``(units,)`` bool."""
        config, method = self.model.config, self.method
        cells = adapter_for(config).cells(config, {"image_grid_thw": grid}, []) or []
        merge = config.vision_config.spatial_merge_size
        sizes = [(rows // merge, columns // merge) for _, rows, columns in grid.tolist()]
        if [len(page) * merge**2 for page in cells] != grid.prod(1).tolist():
            raise ValueError(
                "PixelPrune takes images of one frame; got image_grid_thw="
                f"{grid.tolist()}; give several frames as a video"
            )
        units = unit_pixels(pixels, config.vision_config, self.std)
        kept = kept_units(units, sizes, method.threshold, method.distance, method.min_keep)
        counts = [len(page) for page in cells]
        stays = [part.nonzero()[:, 0] for part in kept.cpu().split(counts)]
        return [PrunedPage(page.cpu(), part) for page, part in zip(cells, stays, strict=True)], kept

    def choose(self, prompt: Prompt[PrunedPage]) -> list[Choice]:
        """The units that were encoded."""
        return [Choice(page.kept) for page in prompt.pages]
