"""The emoji: two packages become one file of images, and a training on them can be stopped."""

import argparse
import base64
import hashlib
import io
import json
import math
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from compress.data import emoji as module
from compress.data.emoji import GROUPS, PACKAGES, chosen, emoji, emoji_file, on_white, prepare
from compress.data.sources import BUILTIN, builtin_parts, load_images
from compress.eval import fidelity
from compress.eval.sampling import to_uint8
from compress.models.builtin import train_ddpm_emoji
from compress.models.builtin.train_ddpm_emoji import Trainer
from compress.runs.diffusion import floor

COUNT = 20


def entries():
    """Ten emoji of two subgroups each, in no order, and one flag."""
    rows = [
        {
            "category": GROUPS[i % 2],
            "subcategory": f"s{i % 2}",
            "sort_order": i,
            "image": f"{i}.png",
        }
        for i in range(COUNT)
    ]
    flag = {"category": "Flags", "subcategory": "flag", "sort_order": 99, "image": "flag.png"}
    return [flag, *rows[::-1]]


def png(colour, side=64):
    target = io.BytesIO()
    Image.new("RGBA", (side, side), colour).save(target, "PNG")
    return target.getvalue()


@pytest.fixture
def archives(tmp_path, monkeypatch):
    """Packages in the layout of the registry's, whose emoji number i has grey level 10 i."""
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))
    for vendor in PACKAGES:
        path = tmp_path / f"emoji-datasource-{vendor}-{module.VERSION}.tgz"
        files = {"emoji.json": json.dumps(entries()).encode()}
        for i in range(COUNT):
            red = 255 if vendor == "twitter" else 10 * i
            files[f"img/{vendor}/64/{i}.png"] = png((red, 10 * i, 10 * i, 255))
        with tarfile.open(path, "w:gz") as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(f"package/{name}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        checksum = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
        monkeypatch.setitem(PACKAGES, vendor, checksum)
    return tmp_path


@pytest.fixture
def prepared(archives):
    return prepare(archives, emoji_file())


def test_an_emoji_is_held_out_of_both_vendors_and_keeps_its_group(prepared):
    numbers = prepared["images"][:, 1, 0, 0] // 10
    assert numbers.tolist() == [*range(COUNT)] * 2 and prepared["vendor"].sum() == COUNT
    assert prepared["groups"].tolist() == (numbers % 2).tolist()
    held_out = prepared["held_out"].bool()
    # the third of every five of a subgroup, which has every second number
    assert numbers[held_out].tolist() == [4, 5, 14, 15] * 2
    images, labels = emoji("held_out")
    assert images.dtype == torch.float32 and labels.tolist() == [0, 1, 0, 1] * 2
    assert torch.equal(images, prepared["images"][held_out].float() / 127.5 - 1)
    assert len(emoji("train")[0]) == 2 * COUNT - 8


def test_which_emoji_are_held_out_does_not_depend_on_the_order_of_the_file():
    assert chosen(entries()) == chosen(entries()[::-1])


def test_a_picture_is_blended_with_white_and_halved():
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (64, 64, 4), dtype=np.uint8)
    target = io.BytesIO()
    Image.fromarray(pixels).save(target, "PNG")
    alpha = pixels[..., 3:].astype(float) / 255
    blended = pixels[..., :3] * alpha + 255 * (1 - alpha)
    expected = blended.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
    # rounded twice
    assert np.abs(on_white(target.getvalue()).numpy() - expected).max() <= 1
    with pytest.raises(ValueError, match="64x64"):
        on_white(png("red", 32))


def test_images_that_are_not_prepared_or_not_whole_name_the_command(archives):
    with pytest.raises(FileNotFoundError, match="run python -m compress.data.emoji"):
        load_images("builtin:emoji", 32, 3)
    emoji_file().parent.mkdir()
    emoji_file().write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="remove it and run python -m compress.data.emoji"):
        emoji("train")
    with pytest.raises(ValueError, match="'train' and 'held_out'; got 'test'"):
        emoji("test")


def test_another_archive_than_the_published_one_is_refused(archives):
    path = archives / f"emoji-datasource-twitter-{module.VERSION}.tgz"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ValueError, match="twitter-.*another checksum"):
        prepare(archives, emoji_file())
    path.unlink()
    with pytest.raises(FileNotFoundError, match="emoji-datasource-twitter"):
        prepare(archives, emoji_file())
    assert not emoji_file().exists()


def test_the_source_gives_both_parts_and_their_groups(prepared):
    data = load_images("builtin:emoji", 32, 3, "label")
    assert torch.equal(data.held_out[1], emoji("held_out")[0][1])
    assert data.train_conditions == emoji("train")[1].tolist()
    with pytest.raises(ValueError, match=r"builtin:emoji has 32x32 .* takes 16x16 with 3"):
        load_images("builtin:emoji", 16, 3)


def test_a_training_that_is_stopped_ends_like_one_that_is_not(prepared, tmp_path, monkeypatch):
    tiny = {"block_out_channels": (4, 4), "norm_num_groups": 2, "attention_head_dim": 4}
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    build = train_ddpm_emoji.UNet2DModel
    monkeypatch.setattr(
        train_ddpm_emoji, "UNet2DModel", lambda **config: build(**config | tiny | blocks)
    )
    monkeypatch.setattr(train_ddpm_emoji, "samples", lambda pipeline: Image.new("RGB", (8, 8)))

    def train(folder, seconds, resume):
        folder.mkdir(exist_ok=True)
        given = {"steps": 4, "every": math.inf, "batch": 4, "lr": 1e-3, "dropout": 0.1}
        args = argparse.Namespace(run=folder, seed=0, device="cpu", seconds=seconds, **given)
        trainer = Trainer(args)
        if resume:
            trainer.resume()
        trainer.run()
        return trainer

    whole = train(tmp_path / "whole", math.inf, False)
    train(tmp_path / "parts", 0, False)
    parts = train(tmp_path / "parts", math.inf, True)
    for name in ("model", "averaged"):
        theirs = getattr(whole, name).state_dict()
        for key, tensor in getattr(parts, name).state_dict().items():
            assert torch.equal(tensor, theirs[key]), f"{name}: {key}"
    assert [row["step"] for row in parts.journal.rows] == [1, 4]
    assert (tmp_path / "parts" / "model" / "model_index.json").is_file()


def test_every_source_that_ships_has_features_of_its_size_and_a_floor(prepared):
    assert set(BUILTIN) == set(fidelity.OF_DATA)
    for source in BUILTIN:
        size = builtin_parts(source)[0][0].shape[-1]
        assert fidelity.classifier_config(fidelity.extractor_of(source))["size"] == size
    found = floor("builtin:emoji", 8)
    assert set(found) == {"fid_emoji", "kid_emoji"} and found["fid_emoji"] > 0
    assert floor("folder:x", 8) == {} and fidelity.extractor_of("folder:x") == fidelity.INCEPTION
    images = to_uint8(emoji("held_out")[0])
    same = fidelity.fidelity(images, images, extractor=fidelity.EMOJI)
    assert same["fid_emoji"] == pytest.approx(0, abs=1e-4) and same["precision_emoji"] == 1
    # three channels are three: grey pictures of the same brightness are other pictures
    grey = images.float().mean(dim=1, keepdim=True).round().to(torch.uint8)
    assert fidelity.fidelity(images, grey, extractor=fidelity.EMOJI)["fid_emoji"] > 1e-3
    with pytest.raises(ValueError, match="emoji-features takes 32x32 images"):
        fidelity.fidelity(images[..., ::2, ::2], images, extractor=fidelity.EMOJI)
