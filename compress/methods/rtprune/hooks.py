"""What RTPrune does with the pages of a running model whose prompts get shorter."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from compress.common.stages import stage
from compress.methods.rtprune.encoder_attention import EncoderRecorder
from compress.methods.rtprune.encoding import encoded_pages
from compress.methods.rtprune.pages import COUNTS, EncodedPage, prune_pages
from compress.models.prompt_pruning import Choice, Prompt, PromptPruning, PrunedPages
from compress.models.visual import adapter_for

if TYPE_CHECKING:
    from compress.methods.rtprune.method import RTPrune

FAMILIES = ("unlimited_ocr", "deepseek_ocr2")  # DeepSeek-OCR is an unlimited_ocr


@contextmanager
def attached(method: "RTPrune", model: Any) -> Iterator[PrunedPages]:
    """:meth:`RTPrune.attach`."""
    if model.config.model_type not in FAMILIES:
        raise ValueError(
            "RTPrune prunes DeepSeek-OCR, Unlimited-OCR and DeepSeek-OCR-2; got "
            f"{adapter_for(model.config).name} (model_type={model.config.model_type!r}); choose a "
            "model of these"
        )
    pages = _Pages(method, model)
    with ExitStack() as stack:
        pruning = PromptPruning(type(method).__name__, model, pages._encode, pages.choose)
        stack.enter_context(pruning.attached())
        if method.select == "visionzip":
            encoder = model.model.vision_tower.vision_encoder
            stack.enter_context(pages.recorder.recording(encoder))
        yield pages.handle


class _Pages:
    """The pages that one attached method encodes and prunes."""

    def __init__(self, method: "RTPrune", model: Any) -> None:
        self.method = method
        self.model = model
        self.handle = PrunedPages(*COUNTS)
        self.recorder = EncoderRecorder()

    def _encode(
        self, original: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> tuple[Any, Sequence[EncodedPage]]:
        """The output of ``get_image_features``, and what is known of its pages."""
        self.recorder.captured.clear()
        output = original(*args, **kwargs)
        if isinstance(output, tuple):
            return output, ()
        inputs = inspect.signature(original).bind(*args, **kwargs).arguments
        with stage("selection"):
            pages = encoded_pages(
                self.method, self.model, output.pooler_output, inputs, self.recorder.captured
            )
        return output, pages

    def choose(self, prompt: Prompt[EncodedPage]) -> list[Choice | None]:
        """Prune each page, those that several sequences share once."""
        first: dict[int, int] = {}
        for number, page in enumerate(prompt.pages):
            first.setdefault(id(page), number)
        numbers = list(first.values())
        instructions = []
        if self.method.select == "cdpruner":
            for row, positions in (prompt.where[number] for number in numbers):
                is_text = prompt.attended[row] & ~prompt.is_visual[row]
                text = is_text.nonzero()[:, 0]
                instructions.append(prompt.embeds[row, text[text > positions[-1]]])
        pruned = prune_pages(
            self.method,
            [prompt.pages[number] for number in numbers],
            [prompt.features[number] for number in numbers],
            instructions,
            self.model.model.multi_modal_projector.bias,
            prompt.fetch,
        )
        self.handle.pages += [page for page, _ in pruned]
        choices = {of_page: choice for of_page, (_, choice) in zip(first, pruned, strict=True)}
        return [choices[id(page)] for page in prompt.pages]
