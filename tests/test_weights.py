"""Weights against configuration: by headers, before memory is taken, and inside their folder."""

import json
import resource
import shutil

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration as QWEN

from builders import vlm
from compress.models.locate import BUILTIN
from compress.models.weights import check_inside, check_weights, stored_tensors

READER = BUILTIN / "reader-qwen"
UNET = "diffusion_pytorch_model"


@pytest.fixture
def reader(tmp_path):
    return shutil.copytree(READER, tmp_path / "reader")


@pytest.fixture
def unet(tmp_path):
    return shutil.copytree(BUILTIN / "ddpm-digits" / "unet", tmp_path / "unet")


def change(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def refused(folder, kind, *words):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        check_weights(folder, kind)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.mark.parametrize("name", ["qwen3_vl", "internvl", "glm_ocr", "got_ocr2", "deepseek_ocr2"])
def test_readers_as_saved_fit(name, tmp_path, caplog):
    model, _ = vlm.build(name)
    model.save_pretrained(tmp_path)
    check_weights(tmp_path, type(model))
    assert not caplog.records


@pytest.mark.parametrize("name", ["labels", "sd1", "sdxl", "ldm", "ldm_text"])
def test_parts_of_pipelines_as_saved_fit(name, family, tmp_path, caplog):
    family(name).save_pretrained(tmp_path)
    parts = {n: p for n, p in family(name).components.items() if isinstance(p, torch.nn.Module)}
    for part, module in parts.items():
        check_weights(tmp_path / part, type(module))
    assert "unet" in parts and not caplog.records


def test_a_tensor_that_is_missing_or_of_another_shape_is_named(reader, unet):
    for folder, kind, file in ((reader, QWEN, "model"), (unet, UNet2DModel, UNET)):
        path = folder / f"{file}.safetensors"
        tensors = load_file(path)
        name = sorted(tensors)[-1]
        shape = tuple(tensors[name].shape)
        save_file(tensors | {name: torch.zeros(7, 7)}, path)
        refused(folder, kind, str(path), name, "(7, 7)", str(shape))
        del tensors[name]
        save_file(tensors, path)
        refused(folder, kind, str(path), name, "missing")


def test_a_tensor_that_the_model_has_not_is_said(unet, caplog):
    path = unet / f"{UNET}.safetensors"
    save_file(load_file(path) | {"added.weight": torch.zeros(1)}, path)
    check_weights(unet, UNet2DModel)
    assert "added.weight" in caplog.text
    caplog.clear()
    save_file(load_file(path) | {"\x1b[2J\nerror: " + "x" * 10_000: torch.zeros(1)}, path)
    check_weights(unet, UNet2DModel)
    assert r"\x1b[2J\nerror: xx" in caplog.messages[0]
    assert len(caplog.messages[0]) < 500 and "\n" not in caplog.messages[0]


@pytest.mark.parametrize(
    "settings",
    [
        {},  # all by default: 7 billion parameters
        {"text_config": {"num_hidden_layers": 10**9}},
        {"text_config": {"num_hidden_layers": 9_000}},
        {"text_config": {"hidden_size": 2**40}},
        {"num_labels": 10**10},
    ],
)
def test_a_configuration_of_a_larger_model_takes_no_memory(settings, reader):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (reader / "config.json").write_text(json.dumps({"model_type": "qwen2_5_vl", **settings}))
    refused(reader, QWEN, "config.json")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB


@pytest.mark.parametrize("key", ["quantization_config", "transformers_weights", "fusion_config"])
def test_settings_that_load_something_else_are_refused(key, reader):
    change(reader / "config.json", **{key: {"quant_method": "gptq"}})
    refused(reader, QWEN, "config.json", key)


def test_an_attention_of_the_hub_is_refused(reader):
    change(reader / "config.json", attn_implementation="somebody/kernel")
    refused(reader, QWEN, "config.json", "somebody/kernel")


@pytest.mark.parametrize("content", ["[]", "5", '{"a": ', "null", "[" * 100_000])
def test_a_configuration_of_another_type_is_refused(content, reader):
    (reader / "config.json").write_text(content)
    refused(reader, QWEN, "config.json")


def sharded(folder, files, stem="model"):
    """Move the one file of weights behind an index."""
    path = folder / f"{stem}.safetensors"
    names = sorted(load_file(path))
    path.rename(folder / "a.safetensors")
    weight_map = dict.fromkeys(names, files)
    (folder / f"{stem}.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def test_shards_that_an_index_names_are_read(reader, unet):
    sharded(reader, "a.safetensors")
    sharded(unet, "a.safetensors", UNET)
    check_weights(reader, QWEN)
    check_weights(unet, UNet2DModel)


@pytest.mark.parametrize(
    "name", ["../stolen.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "", "a.bin"]
)
def test_an_index_names_files_beside_it(name, reader):
    (reader.parent / "stolen.safetensors").write_bytes((reader / "model.safetensors").read_bytes())
    sharded(reader, name)
    refused(reader, QWEN, "index.json", repr(name))


@pytest.mark.parametrize("name", [5, None, ["a.safetensors"], {"a": 1}, 1.5, True])
def test_an_index_of_other_types_is_refused(name, reader):
    sharded(reader, name)
    refused(reader, QWEN, "index.json", repr(name))


@pytest.mark.parametrize("content", [[], {}, {"weight_map": []}, {"weight_map": {}}])
def test_an_index_without_a_map_is_refused(content, reader):
    sharded(reader, "a.safetensors")
    (reader / "model.safetensors.index.json").write_text(json.dumps(content))
    refused(reader, QWEN, "index.json", "weight_map")


def test_a_shard_that_is_missing_is_named(reader):
    sharded(reader, "b.safetensors")
    refused(reader, QWEN, "b.safetensors", "missing")


def test_a_tensor_that_its_shard_has_not_is_named(reader):
    sharded(reader, "a.safetensors")
    path = reader / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    content["weight_map"]["added"] = "a.safetensors"
    path.write_text(json.dumps(content))
    refused(reader, QWEN, "a.safetensors", "added")


@pytest.mark.parametrize(("kind", "stem"), [(QWEN, "model"), (UNet2DModel, UNET)])
def test_an_index_that_would_replace_the_weights_is_refused(kind, stem, reader, unet):
    folder = reader if kind is QWEN else unet
    tensors = load_file(folder / f"{stem}.safetensors")
    save_file({name: torch.zeros_like(t) for name, t in tensors.items()}, folder / "z.safetensors")
    (folder / f"{stem}.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, "z.safetensors")})
    )
    refused(folder, kind, f"{stem}.safetensors.index.json", "once")


def test_a_link_that_leaves_the_folder_is_refused(reader):
    (reader.parent / "other").mkdir()
    sharded(reader, "a.safetensors")
    (reader / "a.safetensors").rename(reader.parent / "other" / "a.safetensors")
    (reader / "a.safetensors").symlink_to(reader.parent / "other" / "a.safetensors")
    refused(reader, QWEN, "a.safetensors", "other")


def test_links_of_the_hub_cache_are_followed(reader, tmp_path):
    repository = tmp_path / "hub" / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    (repository / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    sharded(reader, "a.safetensors")
    for number, path in enumerate(reader.iterdir()):
        path.rename(repository / "blobs" / f"blob{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/blob{number}")
    check_weights(snapshot, QWEN)
    # repositories may share their blobs
    blob = (snapshot / "a.safetensors").resolve()
    shared = tmp_path / "hub" / "blobs" / "ab" / "abcd"
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(shared)
    check_weights(snapshot, QWEN)
    with pytest.raises(ValueError, match="put the file itself there"):
        check_inside(snapshot, snapshot / ".." / "elsewhere")


def header(path, content: bytes, length=None):
    """Write a safetensors file of a header alone."""
    size = len(content) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + content)


def test_damaged_headers_are_named(reader):
    path = reader / "model.safetensors"
    huge = b'{"a":{"dtype":"F32","shape":[%d,%d],"data_offsets":[0,0]}}' % (2**62, 2**62)
    overlap = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4000]}}'
    for content, length in [
        (b"{}", 2**63),
        (b"{}", 99_000_000),
        (b"[1]", None),
        (b"not json", None),
        (b'{"a":{}}', None),
        (b'{"a":{"dtype":"F99","shape":[],"data_offsets":[0,0]}}', None),
        (huge, None),
        (overlap, None),
    ]:
        header(path, content, length)
        refused(reader, QWEN, str(path))
    path.write_bytes(b"")
    refused(reader, QWEN, str(path))


def test_pickled_weights_are_not_found(reader):
    (reader / "model.safetensors").rename(reader / "pytorch_model.bin")
    refused(reader, QWEN, "safetensors", "none")


def test_what_is_stored_is_known_from_headers():
    stored = stored_tensors(READER)
    tensors = load_file(READER / "model.safetensors")
    assert {n: s.shape for n, s in stored.items()} == {
        n: tuple(t.shape) for n, t in tensors.items()
    }
