"""Checkpoints: what is saved is loaded, damage is named, and nobody needs us to load one."""

import hashlib
import json
import re
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
from safetensors.torch import load_file, save_file

from builders import programs
from builders.drawing import draw
from compress.checkpoints.facts import verify
from compress.checkpoints.load import load
from compress.checkpoints.slim import save_slim
from compress.common import files
from compress.common.files import sha256
from compress.models.licence import licence_id
from compress.models.loading import load_pipeline
from compress.models.locate import locate

FACTS = {
    "base_model": "somebody/model",
    "base_hash": "0123abcd",
    "base_licence": "CC BY 4.0, by somebody",
    "recipe": {"seed": 0},
    "widths": [{"level": "block_out_channels[0]", "dense": 16, "compressed": 8}],
    "metrics": {"macs": {"dense": {"value": 2.0}, "compressed": {"value": 1.0}}},
}
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
SAVED = {
    "README.md",
    "compress.json",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    WEIGHTS,
}


def tiny_unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        freq_shift=-4,
    ).eval()


@pytest.fixture(scope="module")
def pipeline():
    scheduler = DDPMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2")
    return DDPMPipeline(unet=tiny_unet(), scheduler=scheduler)


@pytest.fixture(scope="module")
def made(pipeline, tmp_path_factory):
    return save_slim(pipeline, tmp_path_factory.mktemp("made") / "checkpoint", FACTS)


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "checkpoint")


def predict(pipeline: DiffusionPipeline) -> torch.Tensor:
    inputs = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return pipeline.unet.eval()(inputs, torch.tensor([3, 97])).sample


# ---- what is saved -------------------------------------------------------------------------


def test_what_is_loaded_predicts_the_same_bit_for_bit(pipeline, made):
    loaded = load(made)
    assert torch.equal(predict(loaded), predict(pipeline))
    assert type(loaded) is DDPMPipeline and type(loaded.unet) is UNet2DModel
    assert loaded.unet.config.freq_shift == -4
    # "_use_default_values" is how an object in memory was made, and is not stored
    configs = [dict(p.scheduler.config) for p in (loaded, pipeline)]
    assert configs[0].pop("_use_default_values", None) is None
    configs[1].pop("_use_default_values", None)
    assert configs[0] == configs[1]


def test_files_are_all_there_and_none_is_pickled(made):
    found = {p.relative_to(made).as_posix() for p in made.rglob("*") if p.is_file()}
    assert found == SAVED
    pickles = {".bin", ".pt", ".pth", ".pkl", ".ckpt", ".pickle"}
    assert not [p for p in made.rglob("*") if p.suffix in pickles]
    for path in made.rglob("*.json"):
        json.loads(path.read_text(encoding="utf8"))


def test_facts_hold_what_was_given_and_the_hash_of_every_other_file(made):
    facts = json.loads((made / "compress.json").read_text(encoding="utf8"))
    assert {k: facts[k] for k in FACTS} == FACTS
    assert (facts["format"], facts["kind"]) == (2, "slim")
    assert set(facts["files"]) == SAVED - {"compress.json"}
    assert verify(made) == facts


@pytest.mark.parametrize("reached", [True, False])
def test_a_pipeline_of_the_hub_comes_with_its_licence(monkeypatch, tmp_path, reached):
    def licence(name, *, revision, allow_patterns):
        if not reached:
            raise OSError("no network")
        assert (name, revision) == ("somebody/model", "0123abcd") and "LICENSE*" in allow_patterns
        (tmp_path / revision / "README.md").write_text("---\nlicense: mit\n---\n")

    (tmp_path / "0123abcd").mkdir()
    monkeypatch.setattr(DiffusionPipeline, "download", lambda *_, **__: tmp_path / "0123abcd")
    monkeypatch.setattr("compress.models.locate.snapshot_download", licence)
    found = locate("somebody/model", "diffusion").folder
    assert found == tmp_path / "0123abcd" and licence_id(found) == ("mit" if reached else None)


def test_model_card_says_base_licence_widths_and_metrics(made):
    card = (made / "README.md").read_text(encoding="utf8")
    assert card.startswith("---\n") and "library_name: diffusers" in card
    for words in (
        "somebody/model",
        "0123abcd",
        "CC BY 4.0, by somebody",
        "16 -> 8",
        "| macs | 2 |",
    ):
        assert words in card
    assert 'DDPMPipeline.from_pretrained("path/to/this/folder")' in card


def test_text_from_outside_is_no_markup_of_a_card(pipeline, tmp_path):
    evil = "x\n\n# Heading\n<script>alert(1)</script>\u2028[a](http://b) `c` | d"
    facts = FACTS | {"base_model": evil, "base_licence": evil, "recipe": {"data": f"hub:{evil}"}}
    card = (save_slim(pipeline, tmp_path / "c", facts) / "README.md").read_text()
    body = card.split("---\n", 2)[2]
    assert [line for line in body.splitlines() if line.startswith("#")] == [
        body.strip().splitlines()[0]
    ]
    outside = re.sub(r"`[^`\n]*`", "", body.replace("\\`", ""))
    assert "<script>" not in outside and "\u2028" not in body
    assert not re.search(r"(?<!\\)\[a", outside) and r"c \| d, pruned" in outside


@pytest.mark.parametrize("path", ["~nosuchuser/x", "~nosuchuser"])
def test_the_home_of_nobody_is_one_message(path):
    with pytest.raises(ValueError, match="nosuchuser"):
        load(path)


def test_a_model_card_without_facts_does_not_invent_a_licence(pipeline, tmp_path):
    card = (save_slim(pipeline, tmp_path / "c", {}) / "README.md").read_text()
    assert "unknown: see the base model" in card


def test_plain_diffusers_draws_the_same_where_compress_cannot_be_imported(made, tmp_path):
    programs.run("stranger", tmp_path / "images.npz", made, cwd=tmp_path)
    images, expected = np.load(tmp_path / "images.npz")[made.name], draw(load(made))
    np.testing.assert_allclose(images, expected, atol=1e-5)
    assert images.shape == (2, 16, 16, 1) and expected.std() > 0.01
    assert 0 <= images.min() and images.max() <= 1


def test_saving_again_replaces_the_checkpoint_as_a_whole(pipeline, folder):
    with pytest.raises(FileExistsError, match="holds a checkpoint of compress already"):
        save_slim(pipeline, folder, FACTS)
    (folder / "unet" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="and also unet/notes.txt; move that away"):
        save_slim(pipeline, folder, FACTS, overwrite=True)
    (folder / "unet" / "notes.txt").unlink()
    save_slim(pipeline, folder, FACTS | {"recipe": {"seed": 1}}, overwrite=True)
    assert verify(folder)["recipe"] == {"seed": 1}
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()} == SAVED
    assert [p.name for p in folder.parent.iterdir()] == ["checkpoint"]


def test_what_compress_did_not_write_is_never_replaced(pipeline, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    for target in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(FileExistsError, match="no checkpoint of compress"):
            save_slim(pipeline, target, FACTS, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("call", range(1, 4))
def test_a_full_disk_leaves_the_old_checkpoint(pipeline, folder, monkeypatch, call):
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    calls = iter(range(1, 100))

    def full(*args, **kwargs):
        if next(calls) == call:
            raise OSError(28, "No space left on device")

    # compress.json, README.md and, in between, the weights
    monkeypatch.setattr(files.os, "fsync", full)
    real = DDPMPipeline.save_pretrained

    def save(self, *args, **kwargs):
        full()
        real(self, *args, **kwargs)

    monkeypatch.setattr(DDPMPipeline, "save_pretrained", save)
    with pytest.raises(OSError, match="No space left"):
        save_slim(pipeline, folder, FACTS, overwrite=True)
    assert {p: p.read_bytes() for p in folder.parent.rglob("*") if p.is_file()} == before


# ---- damage --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(SAVED - {"compress.json"}))
@pytest.mark.parametrize("where", [0.0, 0.5, 1.0])
def test_a_changed_byte_is_an_error_that_names_the_file(folder, name, where):
    content = bytearray((folder / name).read_bytes())
    content[int(where * (len(content) - 1))] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=name.split("/")[-1].replace(".", r"\.")) as caught:
        load(folder)
    assert str(folder / name) in str(caught.value)


@pytest.mark.parametrize("name", sorted(SAVED - {"compress.json"}))
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        load(folder)
    assert str(folder / name) in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"format": 2, "files": {}}',
        '{"format": 2, "kind": "slim"}',
        '{"format": 1, "kind": "slim", "files": {}, "hash": ""}',
        '{"format": []}',
    ],
)
def test_damaged_facts_are_named(folder, content):
    (folder / "compress.json").write_text(content)
    with pytest.raises(ValueError, match=r"compress\.json"):
        load(folder)


def test_facts_that_were_changed_are_named(folder):
    path = folder / "compress.json"
    facts = json.loads(path.read_text())
    path.write_text(json.dumps(facts | {"base_model": "somebody/else"}))
    with pytest.raises(ValueError, match=r"compress\.json is not what was saved"):
        load(folder)
    path.write_text(json.dumps(facts))  # however it is formatted
    load(folder)


@pytest.mark.parametrize("state", ["deleted", "directory", "loop", "nowhere"])
def test_a_folder_without_facts_is_loaded_with_a_warning(folder, state, caplog):
    path = folder / "compress.json"
    path.unlink()
    if state == "directory":
        path.mkdir()
    elif state != "deleted":
        path.symlink_to(path.name if state == "loop" else "nowhere")
    load(folder)
    assert "not a checkpoint of compress" in caplog.text and str(folder) in caplog.text


def test_built_in_models_are_loaded_without_a_warning(caplog):
    load("builtin:ddpm-digits")
    assert not caplog.records


@pytest.mark.parametrize(
    "name",
    [
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "unet/zeros.safetensors",
        "unet/model.py",
        "chat_template.jinja",
        "vocab.txt",
        "text_encoder/config.json",
    ],
)
def test_a_file_that_was_added_and_might_be_loaded_is_named(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    with pytest.raises(ValueError, match="was added to the checkpoint") as caught:
        load(folder)
    assert str(folder / name) in str(caught.value)


def test_files_that_nothing_loads_may_be_added(folder):
    for name in (".gitattributes", "notes.md", "samples.png", "train.jsonl"):
        (folder / name).write_text("")
    assert "unet" in load(folder).components


def test_a_folder_that_was_linked_in_is_named(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (folder / "vae").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="was added to the checkpoint"):
        load(folder)


def test_a_list_that_leaves_the_folder_is_refused(folder):
    path = folder / "compress.json"
    facts = json.loads(path.read_text())
    (folder.parent / "secret").write_text("")
    files = facts["files"] | {"../secret": sha256(folder.parent / "secret")}
    content = {k: v for k, v in facts.items() if k != "hash"} | {"files": files}
    own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(content | {"hash": own}))
    with pytest.raises(ValueError, match="secret should lie in"):
        load(folder)


# ---- other people's folders ----------------------------------------------------------------


@pytest.fixture
def foreign(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_any_pipeline_folder_loads_in_float32(pipeline, foreign):
    assert torch.equal(predict(load(foreign)), predict(pipeline))
    half = {name: t.half() for name, t in load_file(foreign / WEIGHTS).items()}
    save_file(half, foreign / WEIGHTS)
    loaded = load_pipeline(str(foreign))
    assert {p.dtype for p in loaded.unet.parameters()} == {torch.float32}
    for name, parameter in loaded.unet.named_parameters():
        assert torch.equal(parameter, half[name].float())


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:100],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: b"\xff" * 8 + content[8:],
        lambda content: content[:9] + b"?" + content[10:],
    ],
    ids=["empty", "header cut", "data cut", "too long", "header size", "header text"],
)
def test_corrupt_safetensors_are_named(foreign, damage):
    path = foreign / WEIGHTS
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="does not load") as caught:
        load_pipeline(str(foreign))
    assert str(path) in str(caught.value)


def test_weights_that_lack_a_tensor_are_refused_by_name(foreign):
    tensors = load_file(foreign / WEIGHTS)
    del tensors["conv_in.weight"]
    save_file(tensors, foreign / WEIGHTS)
    # diffusers leaves a parameter without a value, and the run fails much later
    with pytest.raises(ValueError, match=r"conv_in\.weight"):
        load_pipeline(str(foreign))


@pytest.mark.parametrize("name", ["model_index.json", "unet/config.json"])
def test_configuration_that_is_no_json_is_named(foreign, name):
    (foreign / name).write_text("{")
    with pytest.raises(ValueError) as caught:
        load_pipeline(str(foreign))
    assert str(foreign / name) in str(caught.value)


def test_pickled_weights_are_not_read(foreign):
    (foreign / WEIGHTS).rename(foreign / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="pickled weights are not read"):
        load_pipeline(str(foreign))


@pytest.mark.parametrize("name", ["./nowhere", "nowhere", "/no/where/at/all", "~/no-such-folder"])
def test_a_missing_folder_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist; give builtin:NAME"):
        load(name)


def test_a_folder_that_is_no_pipeline_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has a model_index\.json"):
        load(tmp_path)


def test_an_unknown_builtin_lists_the_known_ones():
    models = "ddpm-digits, ddpm-emoji, dit-digits, .*"
    known = f"built-in models are {models}; got 'builtin:digits'; name one"
    with pytest.raises(ValueError, match=known):
        load("builtin:digits")


def test_a_hub_that_does_not_answer_is_one_clear_message(monkeypatch):
    def offline(*args, **kwargs):
        assert kwargs["use_safetensors"] is True
        raise OSError("no network\nlong explanation")

    monkeypatch.setattr(DiffusionPipeline, "download", offline)
    with pytest.raises(ValueError, match="somebody/model.*no network; check") as caught:
        load_pipeline("somebody/model")
    assert "\n" not in str(caught.value)
