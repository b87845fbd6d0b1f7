"""Pages and prompts to what DeepSeek-OCR reads, in the checkpoint's own format."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from pydantic import BaseModel, Field
from transformers import BatchFeature, PreTrainedTokenizerFast

from compress.common.files import read_json, write_json
from compress.common.foreign import foreign
from compress.models.deepseek_ocr_views import MODES, Mode, page_tokens, page_views

IMAGE_TOKEN = "<image>"
PROCESSOR_FILE = "processor_config.json"
DOWNSAMPLING = 4  # two convolutions of stride 2 behind the patches


@dataclass(frozen=True)
class DeepseekOcrProcessor:
    """Pages and prompts to model inputs, as the checkpoint's ``infer`` makes them.

    Parameters
    ----------
    tokenizer : has ``<image>``, and beginning-of-sentence and padding tokens.
    mode : the resolution; ``infer`` uses gundam unless told otherwise.
    patch_size : pixels a side of a patch; a visual token covers four times as many.
    """

    tokenizer: PreTrainedTokenizerFast
    mode: Mode = MODES["gundam"]
    patch_size: int = 16

    def __post_init__(self) -> None:
        if IMAGE_TOKEN not in self.tokenizer.get_vocab():
            raise ValueError(
                f"the tokenizer of DeepSeek-OCR has {IMAGE_TOKEN}; this one does not; add the token"
            )

    @property
    def image_token_id(self) -> int:
        """Id that stands for every visual token, newlines and separators included."""
        return self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)

    def __call__(self, images: Sequence[Image.Image], texts: Sequence[str]) -> BatchFeature:
        """One prompt per image: beginning of sentence, visual tokens, newline, text.

        Parameters
        ----------
        images : one page each.
        texts : what to do with it, e.g. ``"Free OCR."``; blanks at the end are dropped.

        Returns
        -------
        ``input_ids`` and ``attention_mask`` (pages, length), padded on the left; ``pixel_values``
        (pages, 3, side, side); ``num_local_patches`` and ``patches_grid`` of each page; and
        ``pixel_values_local`` (crops of all pages, 3, crop, crop) if a page is cropped.

        Raises
        ------
        ValueError : when there are not as many texts as images, or an image cannot be used.
        """
        if len(images) != len(texts) or not images:
            raise ValueError(
                f"one text per image is expected, and an image; got {len(images)} images and "
                f"{len(texts)} texts"
            )
        pages = [page_views(image, self.mode) for image in images]
        prompts = [
            [
                self.tokenizer.bos_token_id,
                *[self.image_token_id] * len(self.page_tokens(page.grid)),
                *self.tokenizer.encode(f"\n{text}".rstrip(), add_special_tokens=False),
            ]
            for page, text in zip(pages, texts, strict=True)
        ]
        length = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id
        data = {
            "input_ids": torch.tensor([[pad] * (length - len(p)) + p for p in prompts]),
            "attention_mask": torch.tensor(
                [[0] * (length - len(p)) + [1] * len(p) for p in prompts]
            ),
            "pixel_values": torch.stack([page.whole for page in pages]),
            "num_local_patches": [0 if page.crops is None else len(page.crops) for page in pages],
            "patches_grid": [list(page.grid) for page in pages],
        }
        crops = [page.crops for page in pages if page.crops is not None]
        if crops:
            data["pixel_values_local"] = torch.cat(crops)
        return BatchFeature(data)

    def page_tokens(self, grid: tuple[int, int]) -> torch.Tensor:
        """(view, row, column) of a page's visual tokens; see :func:`page_tokens`."""
        pixels = self.patch_size * DOWNSAMPLING
        return page_tokens(-(-self.mode.side // pixels), -(-self.mode.crop // pixels), grid)

    def batch_decode(self, ids: torch.Tensor, skip_special_tokens: bool = True) -> list[str]:
        """Texts of generated ids ``(pages, length)``."""
        return self.tokenizer.batch_decode(ids, skip_special_tokens=skip_special_tokens)


def with_mode(processor: Any, mode: str | None) -> Any:
    """The processor in another resolution mode; itself for None."""
    if mode is None:
        return processor
    if not isinstance(processor, DeepseekOcrProcessor) or mode not in MODES:
        raise ValueError(
            f"modes are those of DeepSeek-OCR: {', '.join(MODES)}; got {mode!r} for a "
            f"{type(processor).__name__}; correct or leave it out"
        )
    return replace(processor, mode=MODES[mode])


def load_processor(folder: Path) -> DeepseekOcrProcessor:
    """The processor of a checkpoint folder.

    Raises
    ------
    ValueError : naming the damaged file.
    FileNotFoundError : when there is no tokenizer.json.
    """
    if not (folder / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"{folder} should have a tokenizer.json; it has none; restore the file"
        )
    with foreign(folder / "tokenizer.json", "a tokenizer"):
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    path = folder / PROCESSOR_FILE
    with foreign(path, "the settings of DeepSeek-OCR's processor"):
        settings = _Settings.model_validate(read_json(path) if path.is_file() else {})
        mode = settings.mode if isinstance(settings.mode, Mode) else MODES[settings.mode]
        return DeepseekOcrProcessor(tokenizer, mode, settings.patch_size)


class _Settings(BaseModel):
    """What is read of a processor's file; what else is there is fixed."""

    mode: Literal["tiny", "small", "base", "large", "gundam"] | Mode = "gundam"
    patch_size: Annotated[int, Field(gt=0, le=64)] = 16


def save_processor(processor: DeepseekOcrProcessor, folder: Path) -> None:
    """Write a processor's files as the checkpoint has them, and its mode unless it is gundam."""
    processor.tokenizer.save_pretrained(folder)
    settings: dict[str, Any] = {
        "add_special_token": False,
        "candidate_resolutions": [[1024, 1024]],
        "downsample_ratio": DOWNSAMPLING,
        "ignore_id": -100,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_token": IMAGE_TOKEN,
        "mask_prompt": False,
        "normalize": True,
        "pad_token": processor.tokenizer.pad_token,
        "patch_size": processor.patch_size,
        "processor_class": "DeepseekVLV2Processor",
        "sft_format": "deepseek",
    }
    if processor.mode != MODES["gundam"]:
        settings["mode"] = asdict(processor.mode)
    write_json(folder / PROCESSOR_FILE, settings)
