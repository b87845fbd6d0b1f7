"""Image files of every kind against pixels that numpy made."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from compress.common.foreign import ForeignFileError
from compress.data.pixels import check_image, frame_count, open_image, upright
from compress.data.sources import load_images

RNG = np.random.default_rng(0)
GREY16 = RNG.integers(0, 2**16, (12, 10), dtype=np.uint16)
GREY = np.rint(GREY16 / 257).astype(np.uint8)
RGB = RNG.integers(0, 256, (12, 10, 3), dtype=np.uint8)
ALPHA = RNG.integers(0, 256, (12, 10), dtype=np.uint8)
BITS = GREY > 127
# what an EXIF orientation asks for
TURNS = {
    1: lambda t: t,
    2: lambda t: t[:, ::-1],
    3: lambda t: t[::-1, ::-1],
    4: lambda t: t[::-1],
    5: lambda t: t.swapaxes(0, 1),
    6: lambda t: np.rot90(t, -1),
    7: lambda t: t[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}


def on_white(colour, alpha):
    share = alpha.astype(float) / 255
    share = share[..., None] if colour.ndim == 3 else share
    return colour * share + 255 * (1 - share)


def palette(**options):
    """Grey 127, 128 and so on, by number, of which some are transparent."""
    image = Image.fromarray(np.uint8(BITS), "P")
    image.putpalette([200, 100, 50, 10, 20, 30])
    return image, options


COLOURS = np.where(BITS[..., None], np.uint8([10, 20, 30]), np.uint8([200, 100, 50]))
SEEN = np.where(BITS[..., None], np.uint8([255, 255, 255]), np.uint8([200, 100, 50]))
HALF = np.where(
    BITS[..., None],
    np.uint8([10, 20, 30]),
    on_white(np.uint8([[[200, 100, 50]]]), np.uint8([[51]])),
)
LOSSLESS = {"lossless": True}
FILES = {
    # (image, options of saving, what it should look like)
    "grey16.png": (Image.fromarray(GREY16), {}, GREY),
    "grey16.tif": (Image.fromarray(GREY16), {}, GREY),
    "grey16-lzw.tif": (Image.fromarray(GREY16), {"compression": "tiff_lzw"}, GREY),
    "grey16-white-is-0.tif": (Image.fromarray(GREY16), {"tiffinfo": {262: 0}}, 255 - GREY),
    "grey16.jp2": (Image.fromarray(GREY16), {"irreversible": False}, GREY),
    "grey16.pgm": (Image.fromarray(GREY16), {}, GREY),
    "grey16-transparent.png": (
        Image.fromarray(np.where(BITS, GREY16, 99).astype(np.uint16)),
        {"transparency": 99},
        np.where(BITS, GREY, 255),
    ),
    "float.tif": (Image.fromarray(np.float32(GREY16 / 65535)), {}, GREY),
    "bits.png": (Image.fromarray(BITS), {}, np.uint8(BITS) * 255),
    "bits.tif": (Image.fromarray(BITS), {"compression": "group4"}, np.uint8(BITS) * 255),
    "rgb.bmp": (Image.fromarray(RGB), {}, RGB),
    "rgb.webp": (Image.fromarray(RGB), LOSSLESS, RGB),
    "cmyk.tif": (Image.fromarray(RGB).convert("CMYK"), {}, RGB),
    "rgba.png": (Image.fromarray(np.dstack([RGB, ALPHA])), {}, on_white(RGB, ALPHA)),
    "rgba.tif": (Image.fromarray(np.dstack([RGB, ALPHA])), {}, on_white(RGB, ALPHA)),
    "rgba.webp": (
        Image.fromarray(np.dstack([RGB, ALPHA])),
        LOSSLESS | {"exact": True},
        on_white(RGB, ALPHA),
    ),
    "la.png": (Image.fromarray(np.dstack([GREY, ALPHA]), "LA"), {}, on_white(GREY, ALPHA)),
    "palette.png": (*palette(), COLOURS),
    "palette-transparent.png": (*palette(transparency=1), SEEN),
    "palette-alpha.png": (*palette(transparency=b"\x33\xff"), HALF),
    "palette-transparent.gif": (*palette(transparency=1), SEEN),
    "rgb-transparent.png": (Image.fromarray(COLOURS), {"transparency": (10, 20, 30)}, SEEN),
}


def luma(pixels):
    return pixels if pixels.ndim == 2 else pixels @ [0.299, 0.587, 0.114]


def close(found, wanted):
    assert found.shape == wanted.shape
    # a level of rounding, twice where transparency is blended before grey is made
    return np.abs(found.astype(float) - wanted).max() <= 1.5


@pytest.mark.parametrize("name", FILES)
def test_every_kind_of_file_has_the_pixels_it_shows(tmp_path, name):
    image, options, wanted = FILES[name]
    image.save(tmp_path / name, **options)
    colour = wanted if wanted.ndim == 3 else np.dstack([wanted] * 3)
    assert close(np.asarray(open_image(tmp_path / name)), colour)
    assert close(np.asarray(open_image(tmp_path / name, "L")), luma(wanted))


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize(
    ("suffix", "pixels", "options"),
    [
        ("png", GREY16, {}),
        ("tif", GREY16, {}),
        ("tif", RGB, {"compression": "tiff_lzw"}),
        ("webp", RGB, LOSSLESS),
        ("jpg", np.full((12, 10, 3), 80, np.uint8), {}),
    ],
)
def test_images_are_turned_as_their_exif_says(tmp_path, orientation, suffix, pixels, options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels).save(path, exif=exif, **options)
    wanted = np.rint(pixels / 257) if pixels.dtype == np.uint16 else pixels
    wanted = wanted if wanted.ndim == 3 else np.dstack([wanted] * 3)
    assert close(np.asarray(open_image(path)), TURNS[orientation](wanted))


def test_a_profile_says_what_the_colours_of_print_are(tmp_path):
    lab, srgb = (ImageCms.createProfile(name) for name in ("LAB", "sRGB"))
    ImageCms.profileToProfile(Image.fromarray(RGB), srgb, lab, outputMode="LAB").save(
        tmp_path / "lab.tif"
    )
    found = np.asarray(open_image(tmp_path / "lab.tif")).astype(int)
    assert np.abs(found - RGB).mean() < 2  # Lab of 8 bits is coarse
    # a profile of other colours is passed over
    profile = ImageCms.ImageCmsProfile(srgb).tobytes()
    print_ready = Image.fromarray(RGB).convert("CMYK")
    print_ready.save(tmp_path / "cmyk.tif", icc_profile=profile)
    assert close(np.asarray(open_image(tmp_path / "cmyk.tif")), RGB)


def test_what_pillow_holds_is_made_upright_too():
    assert close(
        np.asarray(upright(Image.fromarray(np.dstack([RGB, ALPHA])))), on_white(RGB, ALPHA)
    )
    assert close(np.asarray(upright(Image.fromarray(GREY16), "L")), GREY)


def test_frames_are_counted_and_read(tmp_path):
    frames = [Image.fromarray(np.full((4, 5), level, np.uint8)) for level in (10, 20, 30)]
    for name in ("a.tif", "a.gif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        assert frame_count(tmp_path / name) == 3
        found = [int(np.asarray(open_image(tmp_path / name, "L", k))[0, 0]) for k in range(3)]
        assert found == [10, 20, 30]
        with pytest.raises(ValueError, match=name):
            open_image(tmp_path / name, frame=3)


def test_ranges_that_are_not_known_are_refused(tmp_path):
    for name, pixels in {
        "float255.tif": np.float32(GREY),
        "nan.tif": np.full((4, 4), np.nan, np.float32),
        "int32.tif": np.int32(GREY),
    }.items():
        Image.fromarray(pixels).save(tmp_path / name)
        with pytest.raises(ValueError, match=f"{name}.*grey values.*save it with 8 bits"):
            open_image(tmp_path / name)


def png(width, height, data, bits=8, kind=0, transparent=b""):
    def chunk(kind, content):
        body = kind + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0))
    head += chunk(b"tRNS", transparent) if transparent else b""
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("transparent", [(0x0A01, 0x1402, 0x1E03), (0, 0, 5)])
def test_a_colour_of_16_bits_is_transparent(tmp_path, transparent):
    """Pillow reads the upper 8 bits of the channels, so that those below do not decide."""
    colours = np.array([transparent, (0x8000, 0x4000, 0xFFFF), (0, 0, 0x0500)], dtype=">u2")
    data = zlib.compress(b"\0" + colours.tobytes())
    made = png(3, 1, data, 16, 2, struct.pack(">HHH", *transparent))
    (tmp_path / "a.png").write_bytes(made)
    found = np.asarray(open_image(tmp_path / "a.png"))
    assert found.tolist() == [[[255, 255, 255], [128, 64, 255], [0, 0, 5]]]


def encoded(kind):
    file = io.BytesIO()
    Image.fromarray(np.tile(RGB, (20, 20, 1))).save(file, format=kind)
    return file.getvalue()


def damaged(content, at, what):
    return content[:at] + what + content[at + len(what) :]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.png", b"", "none of these"),
        ("text.png", b"no pixels here", "none of these"),
        ("cut.png", encoded("PNG")[:400], "truncated"),
        ("cut.jpg", encoded("JPEG")[:5000], "truncated"),
        ("data.png", damaged(encoded("PNG"), 100, b"\xff" * 50), "broken"),
        ("chunk.png", damaged(encoded("PNG"), 37, b"\xff\xff"), ""),
        ("bomb.png", png(50_000, 50_000, zlib.compress(b"\0" * 1000)), "pixels"),
        ("program.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "none of these"),
    ],
)
def test_files_that_cannot_be_read_are_named_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} should hold an image.*{message}") as caught:
        open_image(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_whatever_is_wrong_with_a_file_is_one_line_that_names_it(tmp_path):
    kinds = [encoded(kind) for kind in ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000")]
    refused = 0
    for number in range(140):
        content = bytearray(kinds[number % len(kinds)])
        for place in RNG.integers(0, [len(content), 200][number % 2], size=1 + number % 5):
            content[place] = RNG.integers(256)
        (tmp_path / "page").write_bytes(content)
        try:
            open_image(tmp_path / "page")
        except ForeignFileError as error:
            refused += 1
            assert str(error).startswith(f"{tmp_path / 'page'} ") and "\n" not in str(error)
    assert refused > 30


def test_no_file_no_pixels_and_no_image(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.png"):
        open_image(tmp_path / "none.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(IsADirectoryError, match="folder.png"):
        open_image(tmp_path / "folder.png")
    with pytest.raises(ValueError, match="page 2 should have 1 to .* pixels; its size is 0x9"):
        check_image(Image.new("RGB", (0, 9)), "page 2")
    with pytest.raises(TypeError, match="got str"):
        check_image("page.png")


def test_a_long_strip_is_cut_before_it_is_resized(tmp_path, monkeypatch):
    sizes = []
    resize = Image.Image.resize

    def noted(image, *arguments):
        sizes.append(image.size)
        return resize(image, *arguments)

    monkeypatch.setattr(Image.Image, "resize", noted)
    for k in range(2):
        Image.fromarray(np.uint8(np.arange(20_000)[None] % 251)).save(tmp_path / f"{k}.png")
    image = load_images(f"folder:{tmp_path}", 128, 1).train[0]
    assert sizes == [(1, 1)]
    assert (image == (9999 % 251) / 127.5 - 1).all()
