"""Where the visual tokens of a prompt are, and which part of the page each of them shows.

One adapter per family of vision-language models has what differs between them: the layout of the
visual tokens, and how a prompt is built.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.models.unlimited_ocr.image_processing_unlimited_ocr import (
    get_optimal_tiled_canvas,
)

from compress.data.pixels import check_image, upright
from compress.models.deepseek_ocr_views import (
    SEPARATOR,
    crop_grid,
    padded_box,
    page_tokens,
    view_tokens,
)

Inputs = Mapping[str, Any]
Cells = Callable[[Any, Inputs, list[int]], list[torch.Tensor] | None]
Prompt = Callable[[Any, Sequence[Image.Image], Sequence[str]], Mapping[str, Any]]
Box = tuple[float, float, float, float]
Places = Callable[[Any, int, int], dict[int, Box]]
Counted = Callable[[Any, int, int], int]

# The keyword under which the text model is given the layouts of its prompt. A method that shortens
# the prompt replaces them by the layouts of what remains; a method that needs them takes these.
VISUAL_LAYOUTS = "visual_layouts"


@dataclass(frozen=True)
class VisualLayout:
    """The visual tokens of one sequence of a batch, in their order; all of it on the CPU.

    Parameters
    ----------
    positions : index of each in the sequence, padding included, ``(tokens,)``.
    grid : (view, row, column) of each, ``(tokens, 3)``. View 0 is the whole page, the others are
        crops: each one a view, or all of them one mosaic where the family lays them out as such.
        A newline token has column -1, a separator row and column -1.
    image_of : which image of the sequence it belongs to, ``(tokens,)``.
    """

    positions: torch.Tensor
    grid: torch.Tensor
    image_of: torch.Tensor

    @property
    def on_page(self) -> torch.Tensor:
        """Which tokens are neither newline nor separator, ``(tokens,)`` bool."""
        return self.grid[:, 2] >= 0

    def of_kept(self, kept: torch.Tensor) -> "VisualLayout":
        """The layout of a sequence that has only some positions of this one.

        Parameters
        ----------
        kept : position in this sequence of each one in the new sequence, -1 for new padding,
            ``(length,)``.
        """
        # one place more, of no token: index -1, of new padding, is that one
        token_at = torch.full((int(torch.cat([kept, self.positions]).max()) + 2,), -1)
        token_at[self.positions] = torch.arange(len(self.positions))
        tokens = token_at[kept]
        positions = (tokens >= 0).nonzero()[:, 0]
        tokens = tokens[positions]
        return VisualLayout(positions, self.grid[tokens], self.image_of[tokens])

    def followed_by(self, later: "VisualLayout", length: int) -> "VisualLayout":
        """The layout of both, of which ``later`` begins behind so many positions."""
        images = len(self.image_of.unique())
        return VisualLayout(
            torch.cat([self.positions, later.positions + length]),
            torch.cat([self.grid, later.grid]),
            torch.cat([self.image_of, later.image_of + images]),
        )


@dataclass(frozen=True)
class ViewOnPage:
    """Which part of a page a view and each of its tokens shows.

    Parameters
    ----------
    box : (x0, y0, x1, y1) of the view in the page's pixels; it reaches beyond the page where the
        page is padded.
    rows, columns : number of its tokens.
    """

    box: Box
    rows: int
    columns: int

    def cell(self, row: int, column: int) -> Box:
        """(x0, y0, x1, y1) of what one token shows, in the page's pixels."""
        x0, y0, x1, y1 = self.box
        across, down = (x1 - x0) / self.columns, (y1 - y0) / self.rows
        left, top = x0 + column * across, y0 + row * down
        return left, top, left + across, top + down


@dataclass(frozen=True)
class Adapter:
    """What is specific to a family.

    Parameters
    ----------
    name : of the family.
    cells : (configuration, model inputs, lengths of the runs of image ids in ``input_ids``) to
        the ``(tokens, 3)`` grids of the images, in their order through the batch; None where the
        inputs do not say how large the images are.
    prompt : (processor, images, texts) to model inputs, one image and one text a sequence, padded
        on the left.
    read_prompt : the text that requests a plain transcription, as the checkpoint's card says; for
        general models our own choice.
    places : (processor, width and height of a page) to the boxes on that page of the views whose
        rows and columns are places, as :class:`ViewOnPage` has them; none for other views.
    tokens : (processor, width and height of a page) to the number of its visual tokens.
    """

    name: str
    cells: Cells
    prompt: Prompt
    read_prompt: str
    places: Places
    tokens: Counted

    def layouts(self, config: Any, inputs: Inputs) -> list[VisualLayout]:
        """The layout of each sequence of a batch.

        Parameters
        ----------
        config : the model's.
        inputs : of the model; ``input_ids`` ``(batch, length)`` and whatever says how large the
            images are. Without the latter (of images that are encoded already) no token has a
            place.
        """
        # the only thing to wait for a device for
        is_visual = (inputs["input_ids"] == config.image_token_id).cpu()
        runs = _runs(is_visual)
        grids = self.cells(config, inputs, runs) if runs else None
        return unplaced(is_visual) if grids is None else layouts_of(is_visual, grids)


def unplaced(is_visual: torch.Tensor) -> list[VisualLayout]:
    """The layout of each sequence of ``(batch, length)`` bool on the CPU; no token has a place."""
    layouts = []
    for positions in _positions(is_visual):
        nowhere = positions.new_tensor([0, SEPARATOR, SEPARATOR]).expand(len(positions), -1)
        layouts.append(VisualLayout(positions, nowhere, torch.zeros_like(positions)))
    return layouts


def layouts_of(is_visual: torch.Tensor, grids: Sequence[torch.Tensor]) -> list[VisualLayout]:
    """The layout of each sequence of a batch, from the tokens of its images.

    Parameters
    ----------
    is_visual : which tokens are visual, ``(batch, length)`` bool, on the CPU.
    grids : (view, row, column) of the tokens of each image, in their order through the batch,
        ``(tokens, 3)``.
    """
    layouts = []
    left = list(grids)
    for positions in _positions(is_visual):
        images = [np.empty((0, 3), np.int64)]
        while left and sum(map(len, images)) < len(positions):
            images.append(left.pop(0).numpy())
        grid = torch.from_numpy(np.concatenate(images))
        if len(grid) != len(positions):
            break
        image_of = np.repeat(np.arange(-1, len(images) - 1), [len(image) for image in images])
        layouts.append(VisualLayout(positions, grid, torch.from_numpy(image_of)))
    if left or len(layouts) != len(is_visual):
        raise ValueError(
            f"the sequences have places for {is_visual.sum(1).tolist()} visual tokens; got images "
            f"of {', '.join(str(len(grid)) for grid in grids)} tokens, which do not fill them one "
            "by one; build both with one call of the processor"
        )
    return layouts


def _positions(is_visual: torch.Tensor) -> list[torch.Tensor]:
    """Where each row of ``(batch, length)`` bool is True."""
    return [torch.from_numpy(np.flatnonzero(row)) for row in is_visual.numpy()]


def _runs(is_visual: torch.Tensor) -> list[int]:
    """Lengths of the runs of True in each row of ``(batch, length)``, through the batch."""
    padded = np.pad(is_visual.numpy(), ((0, 0), (1, 1))).astype(np.int8)
    edges = np.flatnonzero(np.diff(padded))
    return (edges[1::2] - edges[::2]).tolist()


# ---- layouts ---------------------------------------------------------------------------------


def _mosaic_cells(config: Any, inputs: Inputs, runs: list[int]) -> list[torch.Tensor] | None:
    """DeepSeek-OCR, Unlimited-OCR: the crops as one grid, the whole page, a separator."""
    if inputs.get("pixel_values") is None:
        return None
    side, crop = _tokens_a_side(config, inputs)
    counts = crop_counts(inputs)
    sizes = _listed(inputs["patches_grid"]) if any(counts) else counts
    grids = [size if count else (1, 1) for size, count in zip(sizes, counts, strict=True)]
    return [page_tokens(side, crop, (columns, rows)) for columns, rows in grids]


def crop_counts(inputs: Inputs) -> list[int]:
    """DeepSeek-OCR and its relatives: crops of each page, which only pages with crops need say."""
    if inputs.get("pixel_values_local") is None:
        return [0] * len(inputs["pixel_values"])
    return [int(count) for count in _listed(inputs["num_local_patches"])]


def _listed(numbers: Any) -> list[Any]:
    """Numbers of the inputs, which a device is waited for at most once."""
    return numbers.tolist() if torch.is_tensor(numbers) else list(numbers)


def _query_cells(config: Any, inputs: Inputs, runs: list[int]) -> list[torch.Tensor] | None:
    """DeepSeek-OCR-2: crop by crop, the whole page, a separator; no newlines.

    Its tokens are learned queries in the order of the encoder: row and column say which query, not
    which place.
    """
    if inputs.get("pixel_values") is None:
        return None
    side, crop = _tokens_a_side(config, inputs)
    separator = torch.tensor([[0, SEPARATOR, SEPARATOR]])
    return [
        torch.cat(
            [
                *[view_tokens(1 + i, crop, crop, False) for i in range(count)],
                view_tokens(0, side, side, False),
                separator,
            ]
        )
        for count in crop_counts(inputs)
    ]


def _tokens_a_side(config: Any, inputs: Inputs) -> tuple[int, int]:
    pixels = config.vision_config.sam_config.patch_size * 4  # two convolutions of stride 2
    crops = inputs.get("pixel_values_local")
    crop = 0 if crops is None else -(-crops.shape[-1] // pixels)
    return -(-inputs["pixel_values"].shape[-1] // pixels), crop


def _merged_cells(config: Any, inputs: Inputs, runs: list[int]) -> list[torch.Tensor] | None:
    """Qwen-VL and similar: one grid of any size per image, patches merged."""
    if inputs.get("image_grid_thw") is None:
        return None
    merge = config.vision_config.spatial_merge_size
    sizes = inputs["image_grid_thw"].tolist()
    return [view_tokens(0, height // merge, width // merge, False) for _, height, width in sizes]


def _tile_cells(config: Any, inputs: Inputs, runs: list[int]) -> list[torch.Tensor]:
    """InternVL, GOT-OCR2: square tiles, and the whole page last.

    The inputs do not say where the tiles are on the page: each is a view of its own.
    """
    tokens = config.image_seq_length
    side = round(tokens**0.5)
    if side * side != tokens:
        raise ValueError(
            f"a tile's tokens form a square; image_seq_length is {tokens}; correct config.json"
        )
    images = []
    for run in runs:
        if run % tokens:
            raise ValueError(
                f"an image has a multiple of image_seq_length={tokens} tokens; input_ids has a run "
                f"of {run}; build it with the model's processor"
            )
        views = [*range(1, run // tokens), 0]
        images.append(torch.cat([view_tokens(view, side, side, False) for view in views]))
    return images


# ---- where the views are on the page --------------------------------------------------------


def _whole_page(processor: Any, width: int, height: int) -> dict[int, Box]:
    """The page as a whole, whose tokens fill it; the inputs do not say where tiles are."""
    return {0: (0, 0, width, height)}


def _own_places(processor: Any, width: int, height: int) -> dict[int, Box]:
    """DeepSeek-OCR: the crops are one mosaic that fills the page."""
    page = (0, 0, width, height)
    return {0: page if processor.mode.stretched else padded_box(width, height), 1: page}


def _unlimited_places(processor: Any, width: int, height: int) -> dict[int, Box]:
    """Unlimited-OCR: the same, as transformers' image processor is set."""
    page = (0, 0, width, height)
    images = processor.image_processor
    side = max(images.size["height"], images.size["width"])
    stretched = not images.crop_to_patches and side <= images.maximum_pad_value
    return {0: page if stretched else padded_box(width, height), 1: page}


# ---- how many tokens a page of some size has ------------------------------------------------


def _own_tokens(processor: Any, width: int, height: int) -> int:
    """DeepSeek-OCR."""
    crop = processor.mode.crop
    return len(processor.page_tokens(crop_grid(width, height, crop) if crop else (1, 1)))


def _unlimited_tokens(processor: Any, width: int, height: int) -> int:
    """Unlimited-OCR: the same, as transformers' image processor is set."""
    images, grid = processor.image_processor, (1, 1)
    pixels = processor.patch_size * processor.downsample_ratio
    if images.crop_to_patches and max(width, height) > images.tile_size:
        tile = images.tile_size, images.tile_size
        grid = get_optimal_tiled_canvas(
            (height, width), tile, images.min_patches, images.max_patches
        )
    side = max(images.size["height"], images.size["width"])
    return len(page_tokens(-(-side // pixels), -(-images.tile_size // pixels), grid))


def _query_tokens(processor: Any, width: int, height: int) -> int:
    """DeepSeek-OCR-2."""
    images = processor.image_processor
    pixels = processor.patch_size * processor.downsample_ratio
    side, crop = (-(-size // pixels) for size in (images.size["height"], images.tile_size))
    crops = int(images.get_number_of_image_patches(height, width, {})) - 1
    return side * side + crops * crop * crop + 1


def _merged_tokens(processor: Any, width: int, height: int) -> int:
    """Qwen-VL and similar: patches, merged."""
    images = processor.image_processor
    return int(images.get_number_of_image_patches(height, width, {})) // images.merge_size**2


def _tile_tokens(processor: Any, width: int, height: int) -> int:
    """InternVL, whose processor cuts pages into tiles unless told otherwise."""
    cut = {"crop_to_patches": True}
    tiles = int(processor.image_processor.get_number_of_image_patches(height, width, cut))
    return tiles * int(processor.image_seq_length)


def _got_tokens(processor: Any, width: int, height: int) -> int:
    """GOT-OCR2: one tile, unless its image processor cuts the page."""
    tiles = int(processor.image_processor.get_number_of_image_patches(height, width, {}))
    return tiles * int(getattr(processor, "num_image_tokens", 256))  # below transformers 5.23


# ---- prompts ---------------------------------------------------------------------------------


def _chat_prompt(
    processor: Any, images: Sequence[Image.Image], texts: Sequence[str]
) -> Mapping[str, Any]:
    """The checkpoint's chat template: the image, then the text."""
    conversations = [
        [
            {
                "role": "user",
                "content": [{"type": "image", "image": image}, {"type": "text", "text": text}],
            }
        ]
        for image, text in zip(images, texts, strict=True)
    ]
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True, "padding_side": "left"},
    )


def _plain_prompt(
    processor: Any, images: Sequence[Image.Image], texts: Sequence[str]
) -> Mapping[str, Any]:
    """DeepSeek-OCR-2: the image, a newline, the text; its checkpoint has no template."""
    return _processed(processor, images, [f"{processor.image_token}\n{text}" for text in texts])


def _got_prompt(
    processor: Any, images: Sequence[Image.Image], texts: Sequence[str]
) -> Mapping[str, Any]:
    """GOT-OCR2 (arXiv 2409.01704) has a format but no template; its texts are like ``"OCR: "``."""
    start, end = processor.message_start_token, processor.message_end_token
    image = f"{processor.img_start_token}{processor.image_token}{processor.img_end_token}"
    prompts = [
        f"{start}{processor.system_query}{end}{start}user\n{image}\n{text}{end}{start}assistant\n"
        for text in texts
    ]
    return _processed(processor, images, prompts)


def _processed(processor: Any, images: Sequence[Image.Image], prompts: list[str]) -> Any:
    padding = {"padding": True, "padding_side": "left"}
    return processor(images=list(images), text=prompts, return_tensors="pt", **padding)


_TRANSCRIBE = "Transcribe all text of this page, in reading order. Answer with the text only."
ADAPTERS = {
    "deepseek_ocr": Adapter(
        "DeepSeek-OCR",
        _mosaic_cells,
        lambda processor, images, texts: processor(images, texts),
        "Free OCR.",
        _own_places,
        _own_tokens,
    ),
    "unlimited_ocr": Adapter(
        "Unlimited-OCR",
        _mosaic_cells,
        _chat_prompt,
        "document parsing.",
        _unlimited_places,
        _unlimited_tokens,
    ),
    "deepseek_ocr2": Adapter(  # a token is a query, which has no place
        "DeepSeek-OCR-2", _query_cells, _plain_prompt, "Free OCR.", lambda *_: {}, _query_tokens
    ),
    "qwen2_5_vl": Adapter(
        "Qwen2.5-VL", _merged_cells, _chat_prompt, _TRANSCRIBE, _whole_page, _merged_tokens
    ),
    "qwen3_vl": Adapter(
        "Qwen3-VL", _merged_cells, _chat_prompt, _TRANSCRIBE, _whole_page, _merged_tokens
    ),
    "internvl": Adapter(
        "InternVL3", _tile_cells, _chat_prompt, _TRANSCRIBE, _whole_page, _tile_tokens
    ),
    "paddleocr_vl": Adapter(
        "PaddleOCR-VL", _merged_cells, _chat_prompt, "OCR:", _whole_page, _merged_tokens
    ),
    "glm_ocr": Adapter(
        "GLM-OCR", _merged_cells, _chat_prompt, "Text Recognition:", _whole_page, _merged_tokens
    ),
    "got_ocr2": Adapter("GOT-OCR2", _tile_cells, _got_prompt, "OCR: ", _whole_page, _got_tokens),
}


# ---- what methods call -----------------------------------------------------------------------


def adapter_for(config: Any) -> Adapter:
    """The adapter of a model with that configuration."""
    kind = config.model_type
    # the same classes compute both: only Unlimited-OCR has a sliding window
    if kind == "unlimited_ocr" and set(config.text_config.layer_types) == {"full_attention"}:
        kind = "deepseek_ocr"
    if kind not in ADAPTERS:
        raise ValueError(
            f"no adapter for the architecture {kind!r}; the known ones are {', '.join(ADAPTERS)}; "
            "add one in compress/models/visual.py"
        )
    return ADAPTERS[kind]


def build_prompt(
    model: Any, processor: Any, images: Sequence[Image.Image], texts: Sequence[str]
) -> Mapping[str, Any]:
    """Model inputs for pages with one text each, padded on the left."""
    if len(images) != len(texts):
        raise ValueError(
            f"one text per image is expected; got {len(images)} images and {len(texts)} texts"
        )
    for number, image in enumerate(images):
        check_image(image, f"image {number}")
    return adapter_for(model.config).prompt(processor, [upright(i) for i in images], texts)


def inputs_for(model: Any, inputs: Inputs) -> dict[str, Any]:
    """Model inputs with their tensors on the model's device, and pixels in its dtype."""
    return {
        name: part.to(model.device, model.dtype if part.is_floating_point() else None)
        if isinstance(part, torch.Tensor)
        else part
        for name, part in inputs.items()
    }


def visual_layouts(model: Any, inputs: Inputs) -> list[VisualLayout]:
    """The layout of each sequence of a model's inputs; see :meth:`Adapter.layouts`."""
    return adapter_for(model.config).layouts(model.config, inputs)


def views_on_page(
    model: Any, processor: Any, image: Image.Image, grid: torch.Tensor
) -> dict[int, ViewOnPage]:
    """Which part of a page each view shows, by its number; empty where tokens have no place.

    Parameters
    ----------
    model, processor : of :func:`compress.models.vlm.load_vlm`.
    image : the page.
    grid : of all its visual tokens, ``(tokens, 3)``; see :class:`VisualLayout`.
    """
    boxes = adapter_for(model.config).places(processor, image.width, image.height)
    views = {}
    for view in sorted(set(grid[:, 0].tolist()) & set(boxes)):
        rows, columns = (grid[grid[:, 0] == view, 1:].amax(0) + 1).tolist()
        views[view] = ViewOnPage(boxes[view], rows, columns)
    return views


def text_model(model: Any) -> Any:
    """The decoder, a module, that reads text and visual tokens; its layers are ``.layers``."""
    adapter_for(model.config)
    return model.model.language_model
