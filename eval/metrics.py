"""Every metric that is reported: its label, direction, unit, and how tables write it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

Better = Literal["lower", "higher", ""]
Group = Literal["size", "quality", "speed", "more"]

# the groups in their order in reports and comparisons, and their headings; the last is folded away
GROUPS: Mapping[Group, str] = MappingProxyType(
    {"size": "Size", "quality": "Quality", "speed": "Speed", "more": "More metrics"}
)

# ends the name of a metric over the pages in a font that no training page has
UNSEEN_FONT = "_unseen_font"
# begins the name of a benchmark's rate of one of its files
PASS_RATE = "pass_rate_"


@dataclass(frozen=True)
class Metric:
    """What is known of a metric whatever its value.

    Attributes
    ----------
    label : for people.
    better : the direction in which it is better; empty for a plain count.
    unit : of its values, "share" for fractions that are shown in per cent; empty for none.
    how : how it is measured, where every run measures it in the same way.
    group : what it belongs to; "more" is not among the numbers of the headline.
    heading : of its column in a generated table; the label when empty.
    form : format of its values in a generated table.
    scale : factor of its values in a generated table, which the heading names.
    """

    label: str
    better: Better = ""
    unit: str = ""
    how: str = ""
    group: Group = "more"
    heading: str = ""
    form: str = ".4g"
    scale: float = 1.0

    @property
    def arrow(self) -> str:
        """The direction in which it is better as an arrow."""
        return arrow(self.better)

    def column(self) -> str:
        """Heading of its column in a generated table."""
        return self.heading or self.label

    def cell(self, value: float) -> str:
        """A value as a generated table writes it."""
        return f"{value * self.scale:{self.form}}"


DIFFUSION = {
    "params": Metric("Parameters", "lower", "parameters", group="size"),
    "macs": Metric("MACs", "lower", "MACs per forward", group="size"),
    "validation_loss": Metric(
        "Validation loss",
        "lower",
        "MSE of the prediction",
        heading="validation loss",
        form=".5f",
        group="quality",
    ),
    "fid": Metric("FID", "lower", "distance", group="quality"),
    "fid_digits": Metric(
        "FID (digits features)",
        "lower",
        "distance",
        heading="fid_digits",
        form=".2f",
        group="quality",
    ),
    "fid_emoji": Metric(
        "FID (emoji features)",
        "lower",
        "distance",
        heading="fid_emoji",
        form=".2f",
        group="quality",
    ),
    "kid": Metric("KID", "lower", "squared MMD"),
    "kid_digits": Metric(
        "KID (digits features)",
        "lower",
        "squared MMD",
        heading="kid_digits ×10³",
        form=".2f",
        scale=1e3,
    ),
    "kid_emoji": Metric(
        "KID (emoji features)",
        "lower",
        "squared MMD",
        heading="kid_emoji ×10³",
        form=".2f",
        scale=1e3,
    ),
    "is": Metric("Inception score", "higher", "score"),
    "is_digits": Metric("IS (digits logits)", "higher", "score"),
    "is_emoji": Metric("IS (emoji logits)", "higher", "score"),
    "precision": Metric("Precision", "higher", "share"),
    "precision_digits": Metric("Precision (digits features)", "higher", "share"),
    "precision_emoji": Metric("Precision (emoji features)", "higher", "share"),
    "recall": Metric("Recall", "higher", "share"),
    "recall_digits": Metric("Recall (digits features)", "higher", "share"),
    "recall_emoji": Metric("Recall (emoji features)", "higher", "share"),
    "ssim_to_dense": Metric("SSIM to dense", "higher", "SSIM", form=".4f", group="quality"),
    "mse_to_dense": Metric("MSE to dense", "lower", "squared grey level"),
    "looks_like_digits": Metric("Looks like digits", "higher", "share", group="quality"),
    "class_accuracy": Metric(
        "Class accuracy",
        "higher",
        "share",
        heading="class accuracy",
        form=".1%",
        group="quality",
    ),
    "class_share_min": Metric("Rarest class", "higher", "share"),
    "class_share_max": Metric("Most frequent class", "lower", "share"),
    "latency_ms": Metric("Latency per step (ms)", "lower", "ms per denoising step", group="speed"),
    "images_per_second": Metric("Images per second", "higher", "images/s", group="speed"),
    "peak_memory_mb": Metric("Peak memory (MB)", "lower", "MB", group="size"),
}
OCR = {
    "accuracy_retention": Metric("Accuracy retention", "higher", "share", group="quality"),
    "ned": Metric("Normalised edit distance", "lower", heading="NED", form=".2%"),
    "ned_corpus": Metric("Normalised edit distance, corpus", "lower"),
    "cer": Metric("CER", "lower"),
    "cer_corpus": Metric(
        "Character error rate (CER)", "lower", heading="CER", form=".2%", group="quality"
    ),
    "wer": Metric("WER", "lower"),
    "wer_corpus": Metric("WER, corpus", "lower"),
    "bleu": Metric("BLEU", "higher"),
    "bleu_corpus": Metric("BLEU, corpus", "higher", heading="BLEU", form=".2%"),
    "meteor_exact_stem": Metric("METEOR (exact, stem)", "higher"),
    "token_precision": Metric("Token precision", "higher"),
    "token_recall": Metric("Token recall", "higher"),
    "token_f1": Metric("Token F1", "higher", heading="F1", form=".2%", group="quality"),
    "token_multiset_f1": Metric("Token F1, multisets", "higher"),
    "text_edit": Metric("Text edit distance", "lower", group="quality"),
    "text_edit_whole": Metric("Text edit distance, whole", "lower"),
    "formula_edit": Metric("Formula edit distance", "lower", group="quality"),
    "reading_order_edit": Metric("Reading order edit distance", "lower", group="quality"),
    "teds": Metric("Table similarity (TEDS)", "higher", heading="TEDS", group="quality"),
    "teds_structure": Metric("TEDS, structure only", "higher"),
    "overall_proxy": Metric("Overall, without CDM", "higher", group="quality"),
    "score": Metric("Score", "higher", group="quality"),
    "score_without_math": Metric("Score, without math", "higher", group="quality"),
    "worst_page_ned": Metric(
        "Worst page, edit distance", "lower", heading="worst page (NED)", form=".2%"
    ),
    "worst_page_delta": Metric("Worst page, rise over dense", "lower"),
    "loop_rate": Metric("Pages that end in a loop", "lower", heading="loops", form=".2%"),
    "failed_pages": Metric(
        "Pages that could not be read", "lower", "pages", form=".0f", group="quality"
    ),
    "empty_page_rate": Metric("Empty pages", "lower"),
    "ocean_edit_distance": Metric("Ocean-OCR edit distance", "lower"),
    "ocean_bleu": Metric("Ocean-OCR BLEU", "higher"),
    "ocean_meteor_exact_stem": Metric("Ocean-OCR METEOR (exact, stem)", "higher"),
    "ocean_precision": Metric("Ocean-OCR precision", "higher"),
    "ocean_recall": Metric("Ocean-OCR recall", "higher"),
    "ocean_f1": Metric("Ocean-OCR F1", "higher"),
    "pages_per_second": Metric("Pages per second", "higher", "pages/s", group="speed"),
    "preprocess_ms": Metric("Opening and preprocessing", "lower", "ms/page", group="speed"),
    "encoder_ms": Metric("Vision encoder", "lower", "ms/page", group="speed"),
    "prefill_ms": Metric("Prefill, without the encoder", "lower", "ms/page", group="speed"),
    "decode_ms": Metric("Decoding", "lower", "ms/page", group="speed"),
    "visual_tokens": Metric("Visual tokens"),
    "new_tokens": Metric("New tokens"),
    "ended_rate": Metric("Pages ended by the model", "higher"),
}
# what a compressed model costs beside the dense one, and its making; of generated tables alone
COSTS = {
    "macs_share": Metric("MACs, of dense", "lower", form=".4f"),
    "params_share": Metric("parameters, of dense", "lower", form=".4f"),
    "latency_share": Metric("latency, of dense", "lower", form=".3f"),
    "prune_cpu_seconds": Metric("time to prune (CPU s)", "lower", form=".1f"),
    "criterion_share": Metric("of it, criterion", "lower", form=".3f"),
}
METRICS = DIFFUSION | OCR | COSTS


def metric(name: str, others: Mapping[str, Metric] = MappingProxyType({})) -> Metric:
    """What is known of a metric by its name in metrics.json.

    Parameters
    ----------
    name : the label of an unknown one is its name with spaces.
    others : further metrics, such as those of the methods.
    """
    stem, unseen, _ = name.partition(UNSEEN_FONT)
    known = METRICS.get(stem) or others.get(stem)
    if known is None:
        # a benchmark has a rate for each of its files
        label = (stem[:1].upper() + stem[1:]).replace("_", " ")
        known = Metric(label, "higher" if stem.startswith(PASS_RATE) else "")
    if not unseen:
        return known
    label, heading = (f"{text}, unseen font" for text in (known.label, known.column()))
    return replace(known, label=label, heading=heading, group="more")


def arrow(better: str) -> str:
    """The direction in which a metric is better, "lower" or "higher", as an arrow."""
    return {"lower": "↓", "higher": "↑"}.get(better, "")


def number_text(value: float | None, unit: str = "") -> str:
    """Four significant digits; counts with their thousands as k, M, G; shares in per cent."""
    if value is None:
        return "?"
    if unit == "share":
        return f"{100 * value:.4g}%"
    for least, size, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / size:.4g} {letter}"
    return f"{value:.4g}"


def side_text(side: Mapping[str, Any], unit: str = "") -> str:
    """A value of metrics.json by `number_text`, or why it was not measured."""
    return side.get("why") or number_text(side["value"], unit)
