"""FID, KID, Inception score, precision and recall, all by torch-fidelity's own code."""

import urllib.request
from pathlib import Path

import torch
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.metric_fid import fid_featuresdict_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_featuresdict_to_metric
from torch_fidelity.metric_kid import kid_featuresdict_to_metric
from torch_fidelity.metric_prc import prc_featuresdict_to_metric
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY
from torch_fidelity.utils import create_feature_extractor, resolve_feature_layer_for_metric

from compress.models.classifiers import classifier_config, load_classifier
from compress.parallel import distributed

DIGITS, EMOJI = "digits-features", "emoji-features"
INCEPTION = "inception-v3-compat"
# the data that has an extractor of its own
OF_DATA = {"builtin:digits": DIGITS, "builtin:emoji": EMOJI}
SUFFIXES = {DIGITS: "_digits", EMOJI: "_emoji", INCEPTION: ""}
NEIGHBOURS = 3
METRICS = ("isc", "fid", "kid", "prc")
# of metrics -> what torch-fidelity calls them
NAMES = {
    "fid": "frechet_inception_distance",
    "kid": "kernel_inception_distance_mean",
    "is": "inception_score_mean",
    "precision": "precision",
    "recall": "recall",
}
# the convention for Inception; the small sets of the others are used whole, or nearly
KID_SUBSETS = {DIGITS: 10, EMOJI: 10, INCEPTION: 100}
KID_SUBSET_SIZE = 1000
DOWNLOAD_WAIT_SECONDS = 10


class ClassifierExtractor(FeatureExtractorBase):
    """torch-fidelity's face of a built-in classifier.

    Provides ``features`` (64 penultimate activations) and ``logits``. Both are float64:
    torch-fidelity computes means and kernels in the dtype of the features, and KID values of 1e-4
    drown in the rounding of float32 sums.

    """

    def __init__(self, name: str, features_list: list[str], **kwargs: object) -> None:
        super().__init__(name, features_list)
        self.classifier = load_classifier(name)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        """Names that ``features_list`` may hold."""
        return "features", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        """Which features a metric uses: logits for the Inception score, else ``features``."""
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        """Not worth compiling."""
        return False

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Features of uint8 images ``(n, 3, size, size)``: float64 ``(n, 64)`` and logits."""
        values = images.float()
        if self.classifier.channels == 1:
            values = values.mean(dim=1, keepdim=True)
        features = self.classifier.features(values / 127.5 - 1)
        layers = {"features": features, "logits": self.classifier.classes(features)}
        return tuple(layers[name].double() for name in self.features_list)


def fidelity(
    samples: torch.Tensor,
    reference: torch.Tensor,
    *,
    extractor: str = DIGITS,
    weights: str | None = None,
    device: str | torch.device = "cpu",
    batch: int = 64,
) -> dict[str, float]:
    """Distances between two sets of images in the feature space of a named extractor.

    Parameters
    ----------
    samples : generated images, uint8 ``(n, 1 or 3, height, width)``; n >= 4.
    reference : real images, uint8 ``(m, 1 or 3, height, width)``; m >= 4, m may differ from n.
    extractor : ``digits-features`` (16x16 only), ``emoji-features`` (32x32 only) or
        ``inception-v3-compat`` (the standard one).
    weights : file of Inception's weights; None lets torch-fidelity download and keep them.
    device : where the extractor runs.
    batch : images per pass.

    Returns
    -------
    dict : ``fid``, ``kid`` (lower is better), ``is``, ``precision``, ``recall`` (higher is better),
        each name with ``_digits`` or ``_emoji`` behind it unless the extractor is Inception.
        ``precision`` is the share of samples inside the reference's manifold (3 neighbours),
        ``recall`` the reverse. KID is unbiased, so it may be slightly negative for equal
        distributions; its kernel is scaled by `kid_gamma`.

    Raises
    ------
    ValueError : for images that do not fit, an unknown extractor, or weights that cannot be had.
    """
    if extractor not in SUFFIXES:
        raise ValueError(
            f"extractor must be one of {sorted(SUFFIXES)}; got {extractor!r}; name one of them"
        )
    for name, images in (("samples", samples), ("reference", reference)):
        _check(name, images, extractor)
    device = torch.device(device)
    if extractor == INCEPTION:
        check_inception(weights)
    else:
        FEATURE_EXTRACTORS_REGISTRY.setdefault(extractor, ClassifierExtractor)
    smaller = min(len(samples), len(reference))
    options = {
        "feature_extractor": extractor,
        "feature_extractor_weights_path": weights,
        "cuda": False,  # moved below, to a device of any kind
        "isc_splits": min(10, len(samples)),
        "kid_subsets": KID_SUBSETS[extractor],
        "kid_subset_size": min(KID_SUBSET_SIZE, smaller),
        "kid_kernel_poly_gamma": kid_gamma(extractor),
        "prc_neighborhood": NEIGHBOURS,
        "save_cpu_ram": True,
        "verbose": False,
    }
    layers = {m: resolve_feature_layer_for_metric(m, **options) for m in METRICS}
    network = create_feature_extractor(extractor, sorted(set(layers.values())), **options)
    network.to(device)
    ours, real = (_features(network, i, batch, device) for i in (samples, reference))

    def measure() -> dict[str, float]:
        statistics = [fid_featuresdict_to_statistics(f, layers["fid"]) for f in (ours, real)]
        return {
            **isc_featuresdict_to_metric(ours, layers["isc"], **options),
            **fid_statistics_to_metric(*statistics, False),
            **kid_featuresdict_to_metric(ours, real, layers["kid"], **options),
            **prc_featuresdict_to_metric(ours, real, layers["prc"], **options),
        }

    values = distributed.from_main(measure)
    return {name + SUFFIXES[extractor]: float(values[key]) for name, key in NAMES.items()}


def _features(
    network: FeatureExtractorBase, images: torch.Tensor, batch: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """Features ``(n, dimensions)`` of all images by layer, on the CPU of every process.

    Several processes extract whole batches in turns, so the features are those of one process.
    """

    @torch.no_grad()
    def extract(part: torch.Tensor) -> dict[str, torch.Tensor]:
        # three equal channels when they are grey
        tuple_ = network(part.expand(-1, 3, -1, -1).to(device))
        return {k: v.cpu() for k, v in network.convert_features_tuple_to_dict(tuple_).items()}

    parts = list(distributed.shared_out(images.split(batch), extract))
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def floor(
    half: torch.Tensor,
    other_half: torch.Tensor,
    *,
    count: int | None = None,
    extractor: str = DIGITS,
) -> dict[str, float]:
    """Metrics between two halves of the real data: what a perfect generator would score.

    Finite sets of real images are not at distance 0 either; every value is read against this.
    `half` takes the place of the samples, `other_half` is the reference of all metrics. Of the
    digits these are halves a and b, of the emoji both parts; the extractors learnt the first.

    FID is biased upwards by about 1 / n, and for a good generator that bias is most of its value:
    the floor of samples of n images per seed is the one with ``count=n``.

    Parameters
    ----------
    half, other_half : uint8 ``(n, channels, height, width)``.
    count : use so many images of ``half``, evenly spaced; None, or more than it has: all.
    extractor : as in `fidelity`.

    Returns
    -------
    dict : the names of `fidelity`.
    """
    if count is not None and count < len(half):
        half = half[torch.linspace(0, len(half) - 1, count).round().long()]
    return fidelity(half, other_half, extractor=extractor)


def kid_gamma(extractor: str) -> float | None:
    """Scale of KID's kernel (gamma <x, y> + 1)^3: 1 / E|x|^2 over what the extractor learnt.

    The convention, 1 / dimensions (None), assumes activations of size about 1, as Inception's are.
    Those of the built-in classifiers are several times larger: the cube then made KID a matter of
    the few longest vectors, with values in the thousands between two halves of the same data.
    """
    return None if extractor == INCEPTION else float(classifier_config(extractor)["kid_gamma"])


def _check(name: str, images: torch.Tensor, extractor: str) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"{name} must be uint8 (n, 1 or 3, height, width); got {images.dtype} "
            f"{tuple(images.shape)}; convert them with sampling.to_uint8"
        )
    if len(images) <= NEIGHBOURS:
        raise ValueError(
            f"{name} must hold at least {NEIGHBOURS + 1} images, for precision and recall with "
            f"{NEIGHBOURS} neighbours; got n={len(images)}; draw more"
        )
    if extractor == INCEPTION:
        return
    size = classifier_config(extractor)["size"]
    if images.shape[-2:] != (size, size):
        raise ValueError(
            f"{extractor} takes {size}x{size} images; {name} are {images.shape[-2]}x"
            f"{images.shape[-1]}; use the extractor {INCEPTION}"
        )


def extractor_of(data: str) -> str:
    """The extractor of the distances on a data source, by its name in a recipe."""
    return OF_DATA.get(data, INCEPTION)


def metric_names(extractor: str) -> list[str]:
    """What `fidelity` measures with an extractor."""
    return [name + SUFFIXES[extractor] for name in NAMES]


def check_inception(weights: str | None) -> None:
    """See that Inception's weights are at hand or can be fetched, before torch-fidelity tries."""
    if weights is not None:
        try:
            # torch-fidelity unpickles the file without restraint: refuse all but plain tensors here
            state = torch.load(weights, map_location="cpu", weights_only=True)  # noqa: TID251
        except Exception as error:  # torch.load raises many kinds for a file that is not its own
            raise ValueError(
                f"Inception's weights were expected as a PyTorch state dict in {weights}; reading "
                f"it failed with {type(error).__name__}; download {URL_INCEPTION_V3} and give its "
                "path"
            ) from error
        layer = state.get("fc.weight") if isinstance(state, dict) else None
        if getattr(layer, "shape", None) != (1008, 2048):
            raise ValueError(
                f"{weights} should hold the Inception of torch-fidelity, whose fc.weight is 1008 x "
                f"2048; it holds another network; download {URL_INCEPTION_V3} and give its path"
            )
        return
    kept = Path(torch.hub.get_dir()) / "checkpoints" / Path(URL_INCEPTION_V3).name
    if kept.is_file():
        return
    try:
        request = urllib.request.Request(URL_INCEPTION_V3, method="HEAD")  # noqa: S310 - https
        urllib.request.urlopen(request, timeout=DOWNLOAD_WAIT_SECONDS).close()  # noqa: S310
    except OSError as error:
        raise ValueError(
            f"the extractor {INCEPTION} needs its weights: no path was given, {kept} does not "
            f"exist, and {URL_INCEPTION_V3} could not be reached ({error}); download that file on "
            "another machine and set evaluate.inception_weights to its path, or name other metrics "
            "in evaluate.metrics"
        ) from error
