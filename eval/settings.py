"""What an evaluation depends on: the settings that recipes, Python and the command line share."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import Field, field_validator

from compress.common.settings import (
    MOST,
    MOST_PROCESSES,
    READS,
    Batch,
    Count,
    Pages,
    Settings,
    Tokens,
)
from compress.eval.metrics import DIFFUSION, OCR, PASS_RATE, UNSEEN_FONT, Metric

T = TypeVar("T")


class _Choice(Settings):
    """Which metrics are wanted."""

    known: ClassVar[Mapping[str, Metric]]
    metrics: tuple[str, ...] | None = None
    """Names of the metrics to measure, as in metrics.json; all of them when null."""

    @field_validator("metrics")
    @classmethod
    def _known(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if unknown := sorted(name for name in names or () if not cls._is_known(name)):
            raise ValueError(
                f"expected metrics among {', '.join(cls.known)}; got {', '.join(unknown)}; choose "
                "among them"
            )
        return names

    @classmethod
    def _is_known(cls, name: str) -> bool:
        return name in cls.known

    def wants(self, *names: str) -> bool:
        """Whether any of these metrics is to be measured."""
        return self.metrics is None or any(name in self.metrics for name in names)


class Sampling(_Choice):
    """How the images of the diffusion suite are drawn, of the dense and the compressed model alike.

    The sampling seeds belong to the evaluation, not to the training: runs with different training
    seeds are compared on the same noise and share the dense model's cached images.
    """

    known = DIFFUSION
    samples: int = Field(512, ge=4, le=1_000_000)
    """Images per sampling seed; the distances need many, and are biased upwards by few. Precision
    and recall look at 3 neighbours, so there are at least 4."""
    sampler: Literal["ddim", "ddpm"] = "ddim"
    """Sampler: ddim (deterministic, eta 0; of flow matching Euler's steps) or ddpm (ancestral)."""
    steps: Count = 20
    """Denoising steps per image."""
    guidance_scale: float | None = Field(None, ge=1)
    """Classifier-free guidance, for pipelines that take prompts; 1 is none, null the pipeline's own
    default."""
    batch: Batch = 128
    """Images that are drawn together; no effect on the noise of an image. Throughput and peak
    memory are measured at this batch, or at 64 if that is less."""
    sampling_seeds: int = Field(3, ge=1, le=1_000)
    """Independent sets of images; the confidence intervals come from their spread, so at least 2
    give one."""
    inception_weights: str | None = Field(None, min_length=1, json_schema_extra=READS)
    """File with the FID Inception weights, for models that need it; torch-fidelity downloads them
    where it is null."""


class SamplingSettings(Sampling):
    """`Sampling` of a pipeline: with the conditions that its images are drawn of."""

    seed: int = 0
    """The first sampling seed; the others follow it."""
    conditions: tuple[Any, ...] = ()
    """Prompts or class labels, for pipelines that take them: sample ``i`` of every seed has the
    ``i``-th of them, in turn."""

    @property
    def seeds(self) -> range:
        """The sampling seeds."""
        return range(self.seed, self.seed + self.sampling_seeds)

    @property
    def batches(self) -> int:
        """Number of batches in which all images are drawn."""
        return self.sampling_seeds * math.ceil(self.samples / self.batch)

    def __str__(self) -> str:
        """Describe it as ``3 seeds x 512 images, DDIM, 20 steps``."""
        extra = f", {len(self.conditions)} conditions in turn" if self.conditions else ""
        if self.guidance_scale is not None:
            extra += f", guidance {self.guidance_scale:g}"
        return (
            f"{self.sampling_seeds} seeds x {self.samples} images, {self.sampler.upper()}, "
            f"{self.steps} steps{extra}"
        )


class ReadSettings(Settings):
    """How a vision-language model reads a page."""

    prompt: str | None = None
    """Instruction to the model; the family's own for plain text when null."""
    max_new_tokens: Tokens | None = None
    """Longest text of a page, in tokens; what the checkpoint says when null."""
    loop_tokens: int | None = Field(512, ge=16, le=MOST)
    """Tokens that exact copies at the end of a text cover when it is stopped as a loop; null never
    stops."""
    no_repeat_ngram: int | None = Field(None, ge=2, le=MOST)
    """Length in tokens of pieces that no text may contain twice; DeepSeek-OCR was evaluated with
    35."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Number format of the weights."""
    mode: Literal["tiny", "small", "base", "large", "gundam"] | None = None
    """Resolution of DeepSeek-OCR; the checkpoint's own when null."""

    @property
    def generation(self) -> dict[str, Any]:
        """What :func:`compress.models.reading.read_pages` takes, by name."""
        return self.model_dump(
            include={"prompt", "max_new_tokens", "loop_tokens", "no_repeat_ngram"}
        )


class PageFiles(Settings):
    """Which pages of files are read, and how they are put together."""

    pages: str | None = None
    """Pages of each PDF, TIFF or GIF, such as 1-3,7 or 5-; all when null."""
    dpi: float = 144
    """Resolution of the pages of a PDF."""
    batch: Batch = 1
    """Pages that are read together, in their order."""
    batch_tokens: Count | None = None
    """Visual tokens of a batch, padding counted, in place of a number of pages: pages of like size
    are put together."""
    workers: int = Field(2, ge=0, le=MOST_PROCESSES)
    """Processes that open images and render PDFs while the model reads, of each process that
    reads."""
    markdown: bool = False
    """Whether each page gets a .md file of its text, too."""


class OcrEvaluation(ReadSettings, _Choice):
    """What a reader is measured on, dense and compressed alike."""

    known = OCR
    samples: Pages = 64
    """Rendered pages of each kind; a folder is read as a whole."""
    unseen_font: bool = False
    """Whether rendered pages come in the font that no training page has, too."""
    batch: Batch = 8
    """Pages that are read together."""
    strict: Literal["corrected", "published"] = "corrected"
    """Rules of the scores of OmniDocBench, olmOCR-bench and Ocean-OCR: with the slips of their
    scripts corrected, or as published as far as eval/README.md says."""

    @classmethod
    def _is_known(cls, name: str) -> bool:
        # a benchmark has a rate for each of its files
        return name.removesuffix(UNSEEN_FONT) in cls.known or name.startswith(PASS_RATE)

    def chosen(self, metrics: Mapping[str, T]) -> dict[str, T]:
        """The wanted ones of some metrics, with those of methods, which are not among the known."""
        return {n: v for n, v in metrics.items() if self.wants(n) or not self._is_known(n)}


class Calibration(Settings):
    """Pages on which a method measures the settings that are left open."""

    pages: int = Field(16, ge=1, le=1_000)
    """Number of calibration pages: rendered validation pages, or the first of a folder."""
    max_new_tokens: Tokens = Field(128, ge=2)
    """Longest text of a calibration page, in tokens."""
