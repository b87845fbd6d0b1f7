"""Images and batches: halves that share nothing, draws made by (seed, step, index) alone."""

import io
import json
from collections import Counter
from importlib.resources import files

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from compress.common.files import walk
from compress.data.batches import StepSampler, flipped, noise_and_timesteps
from compress.data.digits import SIZE, digits
from compress.data.sources import ImageData, Pairs, load_images, stacked

STEPS = 1000
DATA = files("compress.data")


def upsampled() -> np.ndarray:
    """Every digit at 16x16, by the matrix of bilinear interpolation: U X U^T."""
    matrix = np.zeros((16, 8))
    for row in range(16):
        centre = min(max((row + 0.5) / 2 - 0.5, 0), 7)
        left = int(centre)
        matrix[row, left] += 1 - (centre - left)
        matrix[row, min(left + 1, 7)] += centre - left
    return matrix @ load_digits().images @ matrix.T


def as_keys(images) -> Counter:
    # grey levels are multiples of 1/16 of a level of the scan, so integers tell them apart exactly
    whole = np.rint(np.asarray(images, dtype=float) * 16).astype(np.int32)
    return Counter(image.tobytes() for image in whole)


def test_the_stored_digits_and_words_are_those_of_scikit_learn():
    scans = load_file(DATA / "digits.safetensors")
    assert torch.equal(scans["images"].double(), torch.from_numpy(load_digits().images))
    assert torch.equal(scans["labels"].long(), torch.from_numpy(load_digits().target))
    assert (DATA / "words.txt").read_text().split() == sorted(ENGLISH_STOP_WORDS)


def test_halves_are_disjoint_and_complete_and_upsampled_bilinearly():
    halves = {half: digits(half)[0] for half in ("a", "b")}
    assert [tuple(halves[h].shape) for h in "ab"] == [(901, 1, SIZE, SIZE), (896, 1, SIZE, SIZE)]
    back = {half: as_keys((images[:, 0] + 1) * 8) for half, images in halves.items()}
    assert not set(back["a"]) & set(back["b"])
    assert back["a"] + back["b"] == as_keys(upsampled())


def test_halves_are_stratified_and_in_range():
    counts = [digits(half)[1].bincount(minlength=10) for half in ("a", "b")]
    assert (counts[0] - counts[1]).abs().max() <= 1
    assert torch.equal(counts[0] + counts[1], torch.from_numpy(np.bincount(load_digits().target)))
    for half in ("a", "b"):
        images = digits(half)[0]
        assert images.dtype == torch.float32
        assert images.min() >= -1 and images.max() <= 1


def test_labels_belong_to_their_images():
    whole = np.rint(upsampled() * 16).astype(np.int32)
    known = {image.tobytes(): int(t) for image, t in zip(whole, load_digits().target, strict=True)}
    for half in ("a", "b"):
        images, labels = digits(half)
        for image, label in zip(images[:, 0], labels, strict=True):
            key = np.rint(np.asarray((image + 1) * 8, dtype=float) * 16).astype(np.int32).tobytes()
            assert known[key] == int(label)


def test_a_half_is_a_copy_that_its_owner_may_change():
    digits("a")[0].zero_()
    assert digits("a")[0].abs().sum() > 0


def test_unknown_half_is_refused():
    with pytest.raises(ValueError, match="'a' and 'b'; got 'c'"):
        digits("c")


# ---- noise and timesteps -------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(12,), (6, 6), (4, 4, 4), (1, 11), (5, 3, 4)])
def test_shards_put_together_are_the_whole_batch(sizes):
    images = torch.randn(12, 1, 4, 4)
    whole = noise_and_timesteps(images, STEPS, seed=3, step=17)
    shards, first = [], 0
    for size in sizes:
        part = images[first : first + size]
        shards.append(noise_and_timesteps(part, STEPS, 3, 17, first=first, total=12))
        first += size
    for name in ("images", "noise", "timesteps"):
        assert torch.equal(torch.cat([getattr(s, name) for s in shards]), getattr(whole, name))


def test_draws_depend_on_seed_step_and_index_and_on_nothing_else():
    images = torch.zeros(3, 1, 8, 8)
    draws = {
        (seed, step, i): noise.numpy().tobytes()
        for seed in (0, 1, 2**40)
        for step in (0, 1, 1000)
        for i, noise in enumerate(noise_and_timesteps(images, STEPS, seed, step).noise)
    }
    assert len(set(draws.values())) == len(draws)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = noise_and_timesteps(images + 5, STEPS, 1, 1000).noise
    assert [n.numpy().tobytes() for n in again] == [draws[1, 1000, i] for i in range(3)]
    # the global generator is neither read nor moved
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("total", "timesteps"), [(1, 1000), (7, 1000), (32, 1000), (64, 10)])
def test_timesteps_are_stratified(total, timesteps):
    for step in range(20):
        drawn = noise_and_timesteps(torch.zeros(total, 1, 2, 2), timesteps, 0, step).timesteps
        assert drawn.dtype == torch.long
        for i, t in enumerate(drawn.tolist()):
            assert int(i * timesteps / total) <= t <= (i + 1) * timesteps / total
            assert 0 <= t < timesteps


def test_noise_is_standard_normal_and_timesteps_are_uniform():
    batches = [noise_and_timesteps(torch.zeros(32, 1, 8, 8), STEPS, 0, s) for s in range(40)]
    noise = torch.stack([b.noise for b in batches]).flatten()
    # 82k values: five standard errors are 5 / sqrt(82k) for the mean, sqrt(2) times as much for var
    assert abs(noise.mean()) < 0.018 and abs(noise.var() - 1) < 0.025
    share = torch.stack([b.timesteps for b in batches]).float().mean() / STEPS
    assert abs(share - 0.5) < 0.005


# ---- which images a step sees --------------------------------------------------------------


def test_the_batch_of_a_step_does_not_depend_on_where_one_starts():
    whole = list(StepSampler(23, 5, 7, 0, 40))
    for start in (0, 1, 13, 39, 40):
        assert list(StepSampler(23, 5, 7, start, 40)) == whole[start:]
        assert len(StepSampler(23, 5, 7, start, 40)) == 40 - start


@pytest.mark.parametrize(("count", "batch"), [(23, 5), (8, 8), (3, 10), (1, 1)])
def test_every_epoch_is_a_permutation(count, batch):
    seen = [i for indices in StepSampler(count, batch, 0, 0, 6 * count) for i in indices]
    epochs = [seen[k : k + count] for k in range(0, len(seen) - count + 1, count)]
    assert len(epochs) >= 6
    for epoch in epochs:
        assert sorted(epoch) == list(range(count))
    if count > 5:
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_parts_put_together_are_the_whole_batch(parts):
    whole = list(StepSampler(20, 6, 1, 3, 12))
    shards = [list(StepSampler(20, 6, 1, 3, 12, part, parts)) for part in range(parts)]
    assert [sum((s[k] for s in shards), []) for k in range(len(whole))] == whole


def test_seeds_give_other_orders():
    assert list(StepSampler(50, 10, 0, 0, 5)) != list(StepSampler(50, 10, 1, 0, 5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 0, 0, 1), "count=0"),
        ((5, 0, 0, 0, 1), "batch=0"),
        ((5, 4, 0, 0, 1, 0, 3), "batch=4 and 3 processes"),
    ],
)
def test_impossible_batches_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        StepSampler(*arguments)


# ---- sources -------------------------------------------------------------------------------


def test_builtin_digits():
    data = load_images("builtin:digits", 16, 1)
    assert (len(data.train), len(data.held_out)) == (901, 896)
    assert torch.equal(data.train[3], digits("a")[0][3])
    assert torch.equal(data.held_out[3], digits("b")[0][3])


@pytest.mark.parametrize(("size", "channels"), [(32, 1), (16, 3)])
def test_builtin_digits_refuse_another_shape(size, channels):
    with pytest.raises(ValueError, match=f"the model takes {size}x{size} with {channels}"):
        load_images("builtin:digits", size, channels)


@pytest.mark.parametrize("source", ["digits", "folder:", "hub:", "", "builtin:faces", "Folder:x"])
def test_unknown_sources_are_refused(source):
    with pytest.raises(ValueError, match="builtin:emoji, folder:PATH or hub:NAME"):
        load_images(source, 16, 1)


@pytest.fixture
def pictures(tmp_path):
    """Twelve files that differ in everything but are all images, and some that are none."""
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    makes = {
        "a.png": Image.new("RGB", (20, 20), (255, 0, 0)),
        "b.JPG": Image.new("L", (40, 20), 0),
        "c.PnG": Image.new("RGBA", (16, 64), (0, 0, 255, 255)),
        "d.jpeg": Image.new("RGB", (3, 5), (255, 255, 255)),
        "e.BMP": Image.new("1", (20, 30), 1),
        "f.webp": Image.new("RGB", (17, 16), (0, 255, 0)),
        "g.tiff": Image.new("L", (16, 16), 128),
        "h.gif": Image.new("P", (33, 21), 0),
        "deep/i.tif": Image.new("L", (16, 16), 255),
        "deep/deeper/j.png": Image.new("CMYK", (20, 20)).convert("RGB"),
        "deep/k.png": Image.new("LA", (20, 20), (90, 255)),
        "deep/deeper/l.Jpeg": Image.new("RGB", (100, 1), (9, 9, 9)),
        "deep/m.ppm": Image.new("RGB", (20, 20), (7, 7, 7)),
    }
    for name, image in makes.items():
        image.save(tmp_path / name)
    # whatever they are called, or not called
    Image.new("L", (20, 20), 3).save(tmp_path / "deep" / "0001", format="png")
    Image.new("L", (20, 20), 3).save(tmp_path / "deep" / "photo.2026", format="jpeg")
    Image.new("L", (20, 20), 3).save(tmp_path / ".hidden.png")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "labels.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize("channels", [1, 3])
def test_folder_takes_any_nesting_suffix_colour_and_shape(pictures, channels):
    data = load_images(f"folder:{pictures}", 16, channels)
    images = [*data.train, *data.held_out]
    assert len(images) == 15 and len(data.held_out) == 2
    for image in images:
        assert image.shape == (channels, 16, 16) and image.dtype == torch.float32
        assert image.min() >= -1 and image.max() <= 1


def test_folder_holds_out_every_tenth_file_of_the_sorted_list(tmp_path):
    for k in range(25):
        Image.new("L", (4, 4), 10 * k).save(tmp_path / f"{k:02}.png")
    data = load_images(f"folder:{tmp_path}", 4, 1)
    grey = [
        [round((float(i.mean()) + 1) * 127.5 / 10) for i in d] for d in (data.held_out, data.train)
    ]
    assert grey[0] == [0, 10, 20]
    assert grey[1] == [k for k in range(25) if k % 10]


def test_colour_becomes_rgb_in_order_and_grey_by_luminance(tmp_path):
    for k in range(2):
        Image.new("RGB", (8, 8), (255, 0, 0)).save(tmp_path / f"{k}.png")
    red = load_images(f"folder:{tmp_path}", 8, 3).train[0]
    assert red.mean(dim=(1, 2)).tolist() == [1, -1, -1]
    grey = load_images(f"folder:{tmp_path}", 8, 1).train[0]
    assert float(grey.mean()) == pytest.approx(2 * 0.299 - 1, abs=0.01)


@pytest.mark.parametrize("wide", [True, False])
def test_short_side_is_resized_and_the_centre_is_kept(tmp_path, wide):
    # dark and light halves of a 2:1 image meet in the middle; outer quarters (red) are cut away
    pixels = np.zeros((20, 40, 3), dtype=np.uint8)
    pixels[:, 20:] = 255
    pixels[:, :8] = pixels[:, 32:] = (255, 0, 0)
    for k in range(2):
        Image.fromarray(pixels if wide else pixels.transpose(1, 0, 2)).save(tmp_path / f"{k}.png")
    image = load_images(f"folder:{tmp_path}", 10, 3).train[0]
    if not wide:
        image = image.transpose(1, 2)
    assert torch.allclose(image[0], image[1], atol=0.05) and torch.allclose(image[1], image[2])
    assert (image[:, :, 1:3] < -0.95).all() and (image[:, :, 7:9] > 0.95).all()


def test_a_rectangle_is_taken_from_the_middle_in_its_shape(tmp_path):
    columns = np.uint8(np.arange(40))[None].repeat(10, axis=0)
    for k in range(2):
        Image.fromarray(columns).save(tmp_path / f"{k}.png")
    image = load_images(f"folder:{tmp_path}", (10, 20), 1).train[0]
    assert torch.equal(image[0, 4], torch.arange(10, 30) / 127.5 - 1)  # 10 columns from each side
    assert load_images(f"folder:{tmp_path}", (20, 10), 1).train[0].shape == (1, 20, 10)


def test_the_right_size_passes_unchanged(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 16), dtype=np.uint8)
    for k in range(2):
        Image.fromarray(pixels[k]).save(tmp_path / f"{k}.png")
    image = load_images(f"folder:{tmp_path}", 16, 1).train[0]
    assert torch.equal(
        ((image + 1) * 127.5).round().to(torch.uint8)[0], torch.from_numpy(pixels[1])
    )


def test_what_systems_leave_in_a_folder_is_no_image_and_no_class(tmp_path):
    for k in range(12):
        (tmp_path / "cats" if k < 6 else tmp_path / "dogs").mkdir(exist_ok=True)
        Image.new("L", (4, 4), 10 * k).save(tmp_path / ("cats" if k < 6 else "dogs") / f"{k}.png")
    clean = load_images(f"folder:{tmp_path}", 4, 1, "label")
    for name in (
        *(".ipynb_checkpoints/0.png", "__MACOSX/cats/a.png", "@eaDir/a.png", "cats/._0.png"),
        *("cats/.ipynb_checkpoints/0-checkpoint.png", "cats/Thumbs.db"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), 255).save(tmp_path / name, format="png")
    data = load_images(f"folder:{tmp_path}", 4, 1, "label")
    assert list(data.train_conditions) == list(clean.train_conditions)
    assert torch.equal(torch.stack([*data.train]), torch.stack([*clean.train]))


def test_links_to_folders_are_followed_once_and_never_in_a_loop(tmp_path):
    (tmp_path / "data" / "real").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for k in (2, 10, 1):
        Image.new("L", (4, 4), k).save(tmp_path / "data" / "real" / f"{k}.png")
        Image.new("L", (4, 4), k).save(tmp_path / "elsewhere" / f"{k}.png")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data" / "real")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "real" / "loop").symlink_to(tmp_path / "data")
    found = [path.relative_to(tmp_path / "data").as_posix() for path in walk(tmp_path / "data")]
    # page 2 before page 10
    assert found == [f"{part}/{k}.png" for part in ("linked", "real") for k in (1, 2, 10)]


@pytest.mark.parametrize("names", [("train", "test"), ("Training", "val"), ("train", "valid")])
def test_train_and_test_below_a_folder_are_splits(tmp_path, names, caplog):
    for part, (name, count) in enumerate(zip(names, (6, 4), strict=True)):
        for k in range(count):
            folder = tmp_path / name / ("dark" if k % 2 else "bright")
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4), 100 * part + 10 * k).save(folder / f"{k}.png")
    data = load_images(f"folder:{tmp_path}", 4, 1, "label")
    grey = [[round((float(i.mean()) + 1) * 127.5) for i in d] for d in (data.train, data.held_out)]
    assert grey == [[0, 20, 40, 10, 30, 50], [100, 120, 110, 130]]
    assert [list(data.train_conditions), list(data.held_out_conditions)] == [
        *([0, 0, 0, 1, 1, 1], [0, 0, 1, 1])
    ]
    assert not caplog.text
    Image.new("L", (4, 4)).save(tmp_path / "cover.png")
    assert len(load_images(f"folder:{tmp_path}", 4, 1).train) == 6
    assert "1 images are not used" in caplog.text


def test_a_class_called_train_is_no_split(tmp_path):
    for k in range(6):
        folder = tmp_path / ("train" if k % 2 else "bus")
        folder.mkdir(exist_ok=True)
        Image.new("L", (4, 4), k).save(folder / f"{k}.png")
    data = load_images(f"folder:{tmp_path}", 4, 1, "label")
    assert sorted([*data.train_conditions, *data.held_out_conditions]) == [0, 0, 0, 1, 1, 1]


def test_files_with_several_images_are_said(tmp_path, caplog):
    frames = [Image.new("L", (4, 4), k) for k in (50, 60)]
    for name in ("a.gif", "b.tif", "c.png"):
        frames[0].save(tmp_path / name, save_all=name != "c.png", append_images=frames[1:])
    data = load_images(f"folder:{tmp_path}", 4, 1)
    assert {red_level(image) for image in (*data.train, *data.held_out)} == {50}
    assert "the first is used: 2, such as" in caplog.text and "a.gif" in caplog.text


def test_folder_that_is_missing_empty_or_too_small_is_refused(tmp_path):
    with pytest.raises(ValueError, match="nowhere"):
        load_images(f"folder:{tmp_path / 'nowhere'}", 16, 1)
    with pytest.raises(ValueError, match="at least 2 images .* found 0"):
        load_images(f"folder:{tmp_path}", 16, 1)
    Image.new("L", (4, 4)).save(tmp_path / "one.png")
    with pytest.raises(ValueError, match="at least 2 images .* found 1"):
        load_images(f"folder:{tmp_path}", 16, 1)


def test_a_file_that_is_no_image_is_named(tmp_path):
    for k in range(2):
        (tmp_path / f"{k}.png").write_text("no image")
    with pytest.raises(ValueError, match=r"1\.png should hold an image"):
        load_images(f"folder:{tmp_path}", 16, 1).train[0]


def test_split_of_one_image_is_refused():
    with pytest.raises(ValueError, match="at least 2 images expected in mine; found 1"):
        ImageData.split("mine", torch.utils.data.StackDataset([0]))


@pytest.fixture
def hub_cache(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def hub_folder(folder, splits, count=12):
    for split in splits:
        (folder / split).mkdir(parents=True)
        for k in range(count):
            Image.new("RGB", (20, 30), (20 * k, 0, 0)).save(folder / split / f"{k:02}.png")
    return folder


@pytest.mark.parametrize("splits", [("train",), ("train", "test"), ("train", "validation")])
def test_hub_reads_a_local_folder_in_the_layout_of_datasets(tmp_path, hub_cache, splits):
    data = load_images(f"hub:{hub_folder(tmp_path / 'faces', splits)}", 16, 3)
    assert (len(data.train), len(data.held_out)) == ((10, 2) if len(splits) == 1 else (12, 12))
    for image in (data.train[0], data.held_out[0]):
        assert image.shape == (3, 16, 16) and (image[1:] == -1).all()


def test_hub_reads_parquet_with_labels(tmp_path, hub_cache):
    # as CIFAR-10 lies on the hub: encoded images in a column of their own, and a label
    import datasets

    images = [Image.new("L", (8, 8), 10 * k) for k in range(20)]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"img": images, "label": list(range(20))}
    (tmp_path / "set" / "data").mkdir(parents=True)
    made = datasets.Dataset.from_dict(rows, features=features)
    made.to_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    data = load_images(f"hub:{tmp_path / 'set'}", 8, 1)
    assert (len(data.train), len(data.held_out)) == (18, 2)
    assert data.held_out[1].unique().tolist() == pytest.approx([100 / 127.5 - 1])


def test_hub_data_that_cannot_be_used_are_refused(tmp_path, hub_cache):
    with pytest.raises(ValueError, match="split called train; found test"):
        load_images(f"hub:{hub_folder(tmp_path / 'tests', ('test',))}", 16, 3)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "train.csv").write_text("a,b\n1,2\n")
    with pytest.raises(
        ValueError, match=r"exactly one image column; found none among \['a', 'b'\]"
    ):
        load_images(f"hub:{tmp_path / 'texts'}", 16, 3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot be opened"):
        load_images(f"hub:{tmp_path / 'empty'}", 16, 3)


def test_flips_are_a_function_of_seed_step_and_sample():
    images = torch.arange(4 * 64, dtype=torch.float32).view(64, 1, 1, 4)
    whole = flipped(images, seed=1, step=2)
    turned = whole[:, 0, 0, 0] > whole[:, 0, 0, 3]
    assert torch.equal(whole, torch.where(turned[:, None, None, None], images.flip(-1), images))
    assert 20 <= int(turned.sum()) <= 44
    # the second of two processes sees what one process would have seen
    assert torch.equal(flipped(images[32:], seed=1, step=2, first=32), whole[32:])
    assert not torch.equal(flipped(images, seed=1, step=3), whole)
    assert not torch.equal(flipped(images, seed=2, step=2), whole)


# ---- captions and labels -------------------------------------------------------------------


def red_level(image: torch.Tensor) -> int:
    return round((float(image[0].mean()) + 1) * 127.5)


@pytest.fixture
def told(tmp_path):
    """24 pictures in two subfolders; picture k is as red as its caption says."""
    for k in range(24):
        folder = tmp_path / "deep" / ("dark" if k < 12 else "bright")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (10 * k, 0, 0)).save(folder / f"{k:02}.png")
    tables = {
        tmp_path: [{"file_name": f"deep/dark/{k:02}.png", "text": str(10 * k)} for k in range(12)],
        tmp_path / "deep" / "bright": [
            {"file_name": f"{k:02}.png", "text": str(10 * k), "words": f"it is {k}"}
            for k in range(12, 24)
        ],
    }
    for folder, rows in tables.items():
        lines = [json.dumps(row) for row in reversed(rows)]
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    return tmp_path


def test_captions_of_a_folder_stay_with_their_images(told):
    data = load_images(f"folder:{told}", 8, 3, "caption")
    parts = [(data.train, data.train_conditions), (data.held_out, data.held_out_conditions)]
    assert [len(images) for images, _ in parts] == [21, 3]
    for images, captions in parts:
        for index, image in enumerate(images):
            assert red_level(image) == int(captions[index])
    # without captions it is a folder like any other
    assert load_images(f"folder:{told}", 8, 3).train_conditions is None


def test_labels_of_a_folder_are_its_subfolders_in_order(told):
    data = load_images(f"folder:{told}", 8, 3, "label")
    for images, labels in (
        (data.train, data.train_conditions),
        (data.held_out, data.held_out_conditions),
    ):
        # bright comes before dark
        assert [int(red_level(image) < 120) for image in images] == list(labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "metadata.jsonl").unlink(), r"00\.png and 11 others have none in 1 files"),
        (lambda f: Image.new("L", (8, 8)).save(f / "new.png"), r"new\.png and 0 others"),
        (
            lambda f: (f / "metadata.jsonl").write_text('{"file_name": "a.png"}\n'),
            r"line 1 of .*metadata\.jsonl should be .* with texts for file_name and text",
        ),
        (
            lambda f: (f / "metadata.jsonl").write_text('\n{"file_name": "a.png", "text": 3}\n'),
            "line 2 of .*name the column with columns.caption",
        ),
        (lambda f: (f / "metadata.jsonl").write_text("nothing\n"), "got nothing"),
        (lambda f: (f / "metadata.jsonl").write_text("[1]\n"), r"got \[1\]"),
    ],
    ids=["no table", "a picture more", "no text", "a number", "no JSON", "a list"],
)
def test_captions_that_are_missing_are_named(told, change, message):
    change(told)
    with pytest.raises(ValueError, match=message):
        load_images(f"folder:{told}", 8, 3, "caption")


def test_captions_may_hold_any_character_and_begin_with_a_mark(told):
    table = told / "metadata.jsonl"
    rows = [json.loads(line) for line in table.read_text().split("\n") if line]
    for row in rows:
        row["text"] += " one\u2028two\x85three\x0cfour"
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    table.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    data = load_images(f"folder:{told}", 8, 3, "caption")
    captions = [*data.train_conditions, *data.held_out_conditions]
    assert "10 one\u2028two\x85three\x0cfour" in captions


def test_another_column_of_captions(told):
    (told / "metadata.jsonl").unlink()
    data = load_images(f"folder:{told / 'deep' / 'bright'}", 8, 3, "caption", "words")
    assert list(data.held_out_conditions) == ["it is 12", "it is 22"]


def test_labels_and_captions_that_cannot_be(told):
    with pytest.raises(ValueError, match="all 12 images lie in .*sort them into subfolders"):
        load_images(f"folder:{told / 'deep' / 'dark'}", 8, 3, "label")
    with pytest.raises(ValueError, match="takes captions, and builtin:digits has only labels"):
        load_images("builtin:digits", 16, 1, "caption")


def test_labels_of_the_digits():
    data = load_images("builtin:digits", 16, 1, "label")
    assert data.train_conditions == digits("a")[1].tolist()
    assert data.held_out_conditions == digits("b")[1].tolist()


@pytest.fixture
def told_hub(tmp_path, hub_cache):
    """A data set as it lies on the hub, with texts and labels."""
    import datasets

    features = datasets.Features(
        {
            "image": datasets.Image(),
            "prompt": datasets.Value("string"),
            "kind": datasets.ClassLabel(names=["even", "odd"]),
            "label": datasets.Value("float32"),
        }
    )
    (tmp_path / "set" / "data").mkdir(parents=True)
    for split, count in (("train", 12), ("test", 5)):
        rows = {
            "image": [Image.new("RGB", (8, 8), (10 * k, 0, 0)) for k in range(count)],
            "prompt": [f"{10 * k}" for k in range(count)],
            "kind": [k % 2 for k in range(count)],
            "label": [0.5] * count,
        }
        made = datasets.Dataset.from_dict(rows, features=features)
        made.to_parquet(tmp_path / "set" / "data" / f"{split}-00000-of-00001.parquet")
    return f"hub:{tmp_path / 'set'}"


def test_columns_of_the_hub(told_hub):
    captions = load_images(told_hub, 8, 3, "caption", "prompt")
    labels = load_images(told_hub, 8, 3, "label", "kind")
    for part, count in (("train", 12), ("held_out", 5)):
        texts = getattr(captions, f"{part}_conditions")
        assert len(texts) == count
        for k, image in enumerate(getattr(captions, part)):
            assert red_level(image) == int(texts[k])
        assert getattr(labels, f"{part}_conditions") == [k % 2 for k in range(count)]


def test_images_of_the_hub_are_seen_as_files_are(tmp_path, hub_cache):
    import datasets

    def encoded(image, **options):
        file = io.BytesIO()
        image.save(file, format="PNG", **options)
        return {"bytes": file.getvalue(), "path": None}

    rows = [
        encoded(Image.fromarray(np.full((8, 8), 100 * 257, np.uint16))),
        encoded(Image.new("RGBA", (8, 8), (0, 0, 0, 0))),
        {"bytes": b"no image", "path": None},
    ]
    features = datasets.Features({"image": datasets.Image()})
    (tmp_path / "set").mkdir()
    for split, images in {"train": rows, "test": rows[:1]}.items():
        made = datasets.Dataset.from_dict({"image": images}, features=features)
        made.to_parquet(tmp_path / "set" / f"{split}.parquet")
    train = load_images(f"hub:{tmp_path / 'set'}", 8, 3).train
    assert [red_level(train[k]) for k in range(2)] == [100, 255]
    with pytest.raises(ValueError, match="row 2 should hold an image in the column"):
        train[2]


@pytest.mark.parametrize(
    ("wanted", "column", "message"),
    [
        ("caption", None, "'text' = None among .*'prompt'.*columns.caption"),
        ("caption", "kind", "a column of texts; .*'kind' = ClassLabel"),
        ("label", None, "a column of integers; .*'label' = Value.*float32.*columns.label"),
        ("label", "prompt", "a column of integers"),
    ],
)
def test_columns_that_the_hub_does_not_have(told_hub, wanted, column, message):
    with pytest.raises(ValueError, match=message):
        load_images(told_hub, 8, 3, wanted, column)


def test_pictures_come_with_what_is_said_about_them():
    images = torch.arange(3.0).view(3, 1, 1, 1)
    pairs = Pairs(images, ["zero", "one", "two"])
    found = stacked(pairs[index] for index in (2, 0))
    assert found.images.flatten().tolist() == [2, 0] and found.conditions == ["two", "zero"]
    assert stacked([Pairs(images, None)[1]]).conditions is None
    assert [part.conditions for part in found.chunk(2)] == [["two"], ["zero"]]
    assert [len(part.images) for part in found.chunk(2)] == [1, 1]
