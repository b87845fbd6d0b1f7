"""The models that ship: what they are, how well they do, and what their folders promise."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from compress.data.digits import digits
from compress.data.sources import load_images
from compress.eval.sampling import sample
from compress.models.classifiers import BUILTIN, load_classifier
from compress.models.licence import licence_of
from compress.models.loading import load_pipeline
from compress.models.locate import builtin_models, locate
from compress.models.objective import validation_loss

DDPM = BUILTIN / "ddpm-digits"


@pytest.fixture(scope="module")
def pipeline():
    if not (DDPM / "unet" / "diffusion_pytorch_model.safetensors").exists():
        pytest.skip(
            "ddpm-digits has no weights yet; run compress/models/builtin/train_ddpm_digits.py"
        )
    return load_pipeline("builtin:ddpm-digits")


# ---- classifiers ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["digits-features", "digits-judge"])
def test_classifiers_know_the_half_that_they_never_saw(name):
    config = json.loads((BUILTIN / name / "config.json").read_text())
    unseen = {"a": "b", "b": "a"}[config["trained_on"]]
    images, labels = digits(unseen)
    model = load_classifier(name)
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).float()
    assert right.mean() >= 0.98
    # no class is the price of the mean
    assert min(right[labels == digit].mean() for digit in range(10)) >= 0.9


def test_extractor_and_judge_are_strangers():
    folders = {name: BUILTIN / name for name in ("digits-features", "digits-judge")}
    configs = {name: json.loads((f / "config.json").read_text()) for name, f in folders.items()}
    extractor, judge = configs["digits-features"], configs["digits-judge"]
    assert (extractor["trained_on"], judge["trained_on"]) == ("a", "b")
    assert extractor["width"] != judge["width"] and extractor["seed"] != judge["seed"]


def test_features_have_64_values_and_decide_the_class():
    model = load_classifier("digits-features")
    images = digits("b")[0][:32]
    with torch.no_grad():
        features = model.features(images)
        assert features.shape == (32, 64) and (features >= 0).all()
        assert torch.equal(model.classes(features), model(images))


def test_loaded_classifiers_are_frozen():
    model = load_classifier("digits-features")
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_unknown_classifier():
    with pytest.raises(FileNotFoundError, match="digits-nothing"):
        load_classifier("digits-nothing")


# ---- ddpm-digits ---------------------------------------------------------------------------


def test_ddpm_digits_is_what_the_project_needs(pipeline):
    unet = pipeline.unet
    config = unet.config
    assert sum(p.numel() for p in unet.parameters()) >= 1_500_000
    assert (config.sample_size, config.in_channels, config.out_channels) == (16, 1, 1)
    blocks = [*config.down_block_types, *config.up_block_types]
    attention = sum(name.startswith("Attn") for name in blocks)
    assert attention >= 2 and len(config.block_out_channels) >= (2 if attention else 3)
    modules = list(unet.modules())
    assert any(isinstance(m, torch.nn.GroupNorm) for m in modules)
    assert all(
        m.num_groups == config.norm_num_groups for m in modules if isinstance(m, torch.nn.GroupNorm)
    )
    assert pipeline.scheduler.config.prediction_type == "epsilon"


def test_ddpm_digits_is_cheap_enough_for_the_demo(pipeline):
    inputs = torch.zeros(1, 1, 16, 16), torch.zeros(1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        pipeline.unet(*inputs)
    assert counter.get_total_flops() / 2 <= 60e6
    size = sum(path.stat().st_size for path in DDPM.rglob("*") if path.is_file())
    assert size <= 10 * 2**20


def test_ddpm_digits_predicts_noise_on_digits_that_it_never_saw(pipeline):
    images = torch.stack([load_images("builtin:digits", 16, 1).held_out[i] for i in range(128)])
    unet = pipeline.unet.eval()
    loss = validation_loss(lambda x, t: unet(x, t).sample, images, pipeline.scheduler, draws=1)
    # predicting nothing costs 1; the denoising loss of a good digits model is below a tenth of it
    assert loss < 0.12


def test_weights_are_finite_and_named_like_a_plain_unet(pipeline):
    stored = load_file(DDPM / "unet" / "diffusion_pytorch_model.safetensors")
    assert set(stored) == set(pipeline.unet.state_dict())
    assert all(torch.isfinite(tensor).all() for tensor in stored.values())


@pytest.mark.parametrize(
    "name",
    [
        *("ddpm-digits", "ddpm-emoji", "dit-digits"),
        *("digits-features", "digits-judge", "emoji-features"),
    ],
)
def test_training_logs_ship_with_the_weights(name):
    rows = [json.loads(line) for line in (BUILTIN / name / "train.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows]
    assert steps == sorted(set(steps)) and len(steps) >= 3


def test_dit_digits_draws_the_digits_that_are_asked_for():
    pipeline = load_pipeline("builtin:dit-digits")
    assert len(pipeline.transformer.transformer_blocks) >= 12
    folder = locate("builtin:dit-digits").folder
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 10 * 2**20
    labels = [*range(10)] * 3
    drawn = sample(
        pipeline, count=30, steps=10, sampler="ddim", seed=0, conditions=labels, guidance_scale=2.0
    )
    found = load_classifier("digits-judge")(drawn / 127.5 - 1).argmax(1)
    assert (found == torch.tensor(labels)).float().mean() >= 0.9


def test_denoisers_say_whose_images_they_were_trained_on():
    for name in builtin_models("diffusion"):
        said = licence_of(BUILTIN / name, f"builtin:{name}")
        theirs = "see LICENSE-APACHE-2.0; see LICENSE-CC-BY-4.0; " if name == "ddpm-emoji" else ""
        ours = "Apache-2.0, that of compress, whose scripts trained it"
        assert said == f"{ours}; {theirs}see NOTICE"
        assert "CC BY 4.0" in (BUILTIN / name / "NOTICE").read_text()


def test_built_in_models_by_kind():
    assert builtin_models("diffusion") == ["ddpm-digits", "ddpm-emoji", "dit-digits"]
    assert builtin_models("reader") == ["reader-deepseek", "reader-qwen"]


def test_a_hash_is_stable_and_follows_the_weights(pipeline, tmp_path):
    assert locate("builtin:ddpm-digits").hash == locate("builtin:ddpm-digits", "diffusion").hash
    pipeline.save_pretrained(tmp_path / "copy")
    copied = locate(tmp_path / "copy")
    changed = load_pipeline(copied)
    with torch.no_grad():
        next(changed.unet.parameters()).view(-1)[0] += 1e-3
    changed.save_pretrained(tmp_path / "changed")
    assert locate(tmp_path / "changed").hash != copied.hash == locate(str(tmp_path / "copy")).hash


def test_a_model_is_located_once_and_its_kind_is_seen(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "copy")
    found = locate(tmp_path / "copy")
    assert (found.kind, found.folder) == ("diffusion", tmp_path / "copy")
    assert locate(found) is found
    assert locate("builtin:reader-qwen").kind == "reader"
    (tmp_path / "empty").mkdir()
    for name, kind, message in (
        ("builtin:reader-qwen", "diffusion", "a diffusion pipeline is expected"),
        ("builtin:ddpm-digits", "reader", "a reader of pages is expected"),
        ("builtin:nothing", None, "built-in models are"),
    ):
        with pytest.raises(ValueError, match=message):
            locate(name, kind)
    for name, message in ((tmp_path / "empty", "has neither"), ("nowhere", "does not exist")):
        with pytest.raises(FileNotFoundError, match=message):
            locate(name)
