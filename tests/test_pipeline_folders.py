"""Folders of pipelines as people have them: half precision, variants, removed and damaged parts."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import compress
from builders import pipelines
from compress.checkpoints.slim import save_slim
from compress.cli import app
from compress.common.files import folder_hash, is_litter
from compress.eval import fidelity
from compress.models.loading import load_pipeline
from compress.models.pipelines import cast
from compress.runs.forecast import dry_run
from compress.runs.recipe import Recipe

pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture(scope="module")
def saved(family, tmp_path_factory) -> Path:
    """Stable Diffusion as `save_pretrained` writes it."""
    folder = tmp_path_factory.mktemp("saved") / "sd1"
    family("sd1").save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


# ---- damaged folders -----------------------------------------------------------------------

Damage = Callable[[Path], object]


def index(**changes) -> Damage:
    return content("model_index.json", **changes)


def content(name: str, **changes) -> Damage:
    """Change keys of a JSON file; those that are to be `...` go."""

    def change(folder: Path) -> None:
        found = json.loads((folder / name).read_text()) | changes
        kept = {key: value for key, value in found.items() if value is not ...}
        (folder / name).write_text(json.dumps(kept))

    return change


def text(name: str, written: str) -> Damage:
    return lambda folder: (folder / name).write_text(written)


def gone(name: str) -> Damage:
    def remove(folder: Path) -> None:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def renamed(part: str, *names: str) -> Damage:
    """Leave a part's weights under other names alone."""

    def rename(folder: Path) -> None:
        (weights,) = (folder / part).glob("*.safetensors")
        for name in names:
            shutil.copyfile(weights, folder / part / name)
        weights.unlink()

    return rename


def weights(part: str, change: Callable[[dict], dict]) -> Damage:
    def rewrite(folder: Path) -> None:
        (path,) = (folder / part).glob("*.safetensors")
        save_file(change(load_file(path)), path, metadata={"format": "pt"})

    return rewrite


UNET = "unet/diffusion_pytorch_model.safetensors"
DAMAGED: dict[str, tuple[Damage, str]] = {
    "no class": (index(_class_name=...), "_class_name; got None, .*saved with 0"),
    "a class of the future": (
        index(_class_name="StableDiffusion9Pipeline", _diffusers_version="0.99.0"),
        "'StableDiffusion9Pipeline', which diffusers 0.* does not have .*with 0.99.0.*install",
    ),
    "a class that is a number": (index(_class_name=5), "_class_name; got 5"),
    "a class with code of its own": (index(_class_name=["mine", "Mine"]), "got .'mine', 'Mine'"),
    "a class that is no pipeline": (index(_class_name="AutoencoderKL"), "got 'AutoencoderKL'"),
    "no version": (index(_class_name="X", _diffusers_version=...), "version that it does not name"),
    "a list as index": (text("model_index.json", "[]"), "model_index.json should hold a mapping"),
    "no JSON as index": (text("model_index.json", "{"), "model_index.json should hold JSON"),
    "a number as part": (index(unet=5), "of the unet .*; got 5"),
    "a part without class": (index(unet=["diffusers"]), "of the unet .*; got .'diffusers'"),
    "a part that is null": (index(vae=[None, None]), "of the vae .*; got .None, None"),
    "a part that is not named": (index(scheduler=...), "of the scheduler .*; got None"),
    "another library": (index(unet=["antigravity", "fly"]), "of the unet .* fly of antigravity"),
    "a class that chooses a class": (
        index(text_encoder=["transformers", "AutoModel"]),
        "AutoModel of transformers, which is none",
    ),
    "a pipeline as part": (index(vae=["diffusers", "DDPMPipeline"]), "DDPMPipeline of diffusers"),
    "code of the folder": (index(unet=["mine", "Mine"]), "Mine of mine.*code .* is not run"),
    "a class of the library's future": (index(unet=["diffusers", "UNet9"]), "UNet9 of diffusers"),
    "a part in another's place": (index(vae=["diffusers", "UNet2DModel"]), "/vae/.* missing"),
    "no scheduler": (gone("scheduler"), "has a scheduler, a PNDMScheduler, .* no such folder"),
    "no tokenizer": (gone("tokenizer"), "has a tokenizer, a CLIPTokenizer, .* no such folder"),
    "no vae": (gone("vae"), "has a vae, a AutoencoderKL, .* no such folder"),
    "no unet": (gone("unet"), "has a unet, .* no such folder"),
    "no config": (gone("vae/config.json"), "the vae, .* has a config.json; .* has none"),
    "no schedule": (gone("scheduler/scheduler_config.json"), "has a scheduler_config.json"),
    "an empty tokenizer": (
        gone("tokenizer/tokenizer.json"),
        "the tokenizer, a CLIPTokenizer, .* lacks merges.txt, tokenizer.json, vocab.json",
    ),
    "a list as config": (text("unet/config.json", "[]"), "unet/config.json should hold"),
    "a list as text config": (text("text_encoder/config.json", "[]"), "encoder/config.json should"),
    "a list as schedule": (text("scheduler/scheduler_config.json", "[]"), "scheduler_config.json"),
    "a list as tokenizer": (text("tokenizer/tokenizer.json", "[]"), "the tokenizer"),
    "no JSON as config": (text("vae/config.json", "?"), "vae/config.json should hold JSON"),
    "an empty config": (text("text_encoder/config.json", "{}"), "text_encoder"),
    "words as widths": (content("unet/config.json", block_out_channels="wide"), "/unet "),
    "groups that do not fit": (content("vae/config.json", norm_num_groups=3), "/vae "),
    "an unknown activation": (content("text_encoder/config.json", hidden_act="x"), "text_encoder"),
    "an unknown schedule": (
        content("scheduler/scheduler_config.json", beta_schedule="mine"),
        "the scheduler, .*mine",
    ),
    "words as steps": (
        content("scheduler/scheduler_config.json", num_train_timesteps="many"),
        "the scheduler,",
    ),
    "quantised weights": (
        content("unet/config.json", quantization_config={"quant_method": "bitsandbytes"}),
        "quantization_config",
    ),
    "pickled vae": (renamed("vae", "diffusion_pytorch_model.bin"), "weights .*/vae;.*pickled"),
    "pickled text encoder": (
        renamed("text_encoder", "pytorch_model.bin"),
        "weights .*/text_encoder;",
    ),
    "two variants": (
        renamed("vae", *(f"model.{name}.safetensors" for name in ("fp16", "bf16"))),
        "vae should have weights of one variant; it has bf16, fp16",
    ),
    "two variants in two parts": (
        lambda folder: [
            renamed("vae", "diffusion_pytorch_model.fp16.safetensors")(folder),
            renamed("text_encoder", "model.bf16.safetensors")(folder),
        ],
        "weights of one variant; its parts have bf16, fp16",
    ),
    "an unusual name": (renamed("unet", "mine.safetensors"), "unet"),
    "cut weights": (
        lambda folder: (folder / UNET).write_bytes((folder / UNET).read_bytes()[:-9]),
        "model.safetensors .*",
    ),
    "too few tensors": (
        weights("vae", lambda found: dict(list(found.items())[1:])),
        "vae/.* 1 are missing",
    ),
    "tensors of another shape": (
        weights("unet", lambda found: found | {"conv_in.bias": torch.zeros(3)}),
        "unet.*conv_in.bias",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_folder_is_one_line_that_names_what_is_wrong(folder, name):
    damage, message = DAMAGED[name]
    damage(folder)
    told = CliRunner().invoke(app, ["eval", str(folder)])
    assert told.exit_code == 2 and told.stdout == "", told.output
    [line] = told.stderr.splitlines()
    assert line.startswith("error: ") and re.search(message, line)


# ---- half precision, variants, removed parts -----------------------------------------------


def dtypes(pipeline) -> set[torch.dtype]:
    parts = [p for p in pipeline.components.values() if isinstance(p, torch.nn.Module)]
    return {tensor.dtype for part in parts for tensor in part.state_dict().values()} - {torch.int64}


def files(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module", params=["half", "variant"])
def half(request, family, tmp_path_factory):
    """Stable Diffusion in half precision: its folder, and what loads it in plain diffusers."""
    folder = tmp_path_factory.mktemp("half")
    variant = {"variant": "fp16"} if request.param == "variant" else {}
    pipeline = copy.deepcopy(family("sd1"))
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        cast(part, torch.float16)
    pipeline.save_pretrained(folder, **variant)
    return folder, variant


def test_half_precision_is_loaded_as_one_dtype(half):
    folder, variant = half
    found = load_pipeline(str(folder))
    assert dtypes(found) == {torch.float32}
    plain = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32, **variant)
    for name in ("unet", "vae", "text_encoder"):
        theirs = getattr(plain, name).state_dict()
        assert all(
            torch.equal(value, theirs[key])
            for key, value in getattr(found, name).state_dict().items()
        )


# the name that every version of diffusers understands
@pytest.mark.filterwarnings("ignore:.*torch_dtype. is deprecated:FutureWarning")
@pytest.mark.slow
@pytest.mark.parametrize("half", ["half", "variant"], indirect=True)
def test_a_run_on_half_precision_leaves_a_folder_that_plain_diffusers_draws_with(
    half, tmp_path, monkeypatch
):
    monkeypatch.setattr(fidelity, "extractor_of", lambda data: fidelity.DIGITS)
    data = pipelines.pictures(tmp_path / "pictures", 40)
    asked = Recipe.model_validate(
        {
            "model": str(half[0]),
            "data": f"folder:{data}",
            "method": {"name": "oneshot", "criterion": "magnitude", "keep_macs": 0.55, "steps": 0},
            "recover": {"steps": 1, "batch": 4},
            "evaluate": {"samples": 6, "steps": 2, "sampling_seeds": 1, "batch": 4},
        }
    )
    assert dry_run(asked, device="cpu")["problems"] == []
    checkpoint = compress.run(asked, output=tmp_path / "run", device="cpu").checkpoint
    before, after = files(half[0]), files(checkpoint)
    assert all(before[name] == after[name] for name in before if not name.startswith("unet/"))
    # the new weights are stored as they were trained and measured
    assert {t.dtype for t in load_file(checkpoint / UNET).values()} == {torch.float32}
    call = re.search(r"pipeline = .*", (checkpoint / "README.md").read_text())[0]
    assert "torch_dtype=torch.float32" in call and ('variant="fp16"' in call) == bool(half[1])
    names = {"torch": torch, "StableDiffusionPipeline": StableDiffusionPipeline}
    exec(call.replace("path/to/this/folder", str(checkpoint)), names)
    drawn = names["pipeline"]
    assert dtypes(drawn) == {torch.float32}
    drawn.set_progress_bar_config(disable=True)
    assert drawn("red 4", num_inference_steps=1, output_type="np").images.shape == (1, 16, 16, 3)
    assert dtypes(compress.load(checkpoint)) == {torch.float32}


def test_variants_are_read_where_plain_weights_lack(folder, family):
    renamed("vae", "diffusion_pytorch_model.fp16.safetensors")(folder)
    # beside plain weights another variant is no matter
    shutil.copyfile(folder / UNET, folder / "unet" / "diffusion_pytorch_model.ema.safetensors")
    loaded = load_pipeline(str(folder))
    expected = family("sd1").vae.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in loaded.vae.state_dict().items())


def test_what_systems_leave_in_a_model_folder_is_no_part_of_it(folder, tmp_path):
    clean = folder_hash(folder)
    for name in (
        *(
            "unet/._config.json",
            "unet/._diffusion_pytorch_model.safetensors",
            "@eaDir/a.safetensors",
        ),
        *("__MACOSX/unet/._config.json", "vae/.ipynb_checkpoints/config-checkpoint.json"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"\x00\x05\x16\x07")
    loaded = load_pipeline(str(folder))
    assert folder_hash(folder) == clean
    save_slim(loaded, tmp_path / "slim", {}, source=folder)
    assert not [path for path in (tmp_path / "slim").rglob("*") if is_litter(path.name)]


def test_sharded_variants_are_read(family, tmp_path):
    family("sd1").save_pretrained(tmp_path, variant="fp16", max_shard_size="20KB")
    assert len(list((tmp_path / "unet").glob("*.fp16-*.safetensors"))) > 1
    loaded, expected = load_pipeline(str(tmp_path)).unet.state_dict(), family("sd1").unet
    assert all(torch.equal(value, loaded[key]) for key, value in expected.state_dict().items())


def test_a_safety_checker_that_was_removed_is_not_missed(folder, tmp_path):
    checker = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index(safety_checker=checker, feature_extractor=["transformers", "CLIPImageProcessor"])(folder)
    loaded = load_pipeline(str(folder))
    assert loaded.safety_checker is None and loaded.feature_extractor is None
    save_slim(loaded, tmp_path / "slim", {}, source=folder)
    written = json.loads((tmp_path / "slim" / "model_index.json").read_text())
    assert written["safety_checker"] == written["feature_extractor"] == [None, None]
    assert load_pipeline(str(tmp_path / "slim")).safety_checker is None
