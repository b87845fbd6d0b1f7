"""From an image file to upright pixels of 8 bits: the same for training images and for pages."""

import contextlib
import io
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal, Protocol, cast

import numpy as np
from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from compress.common.foreign import ForeignFileError, foreign

Mode = Literal["RGB", "L"]


class Stored(Protocol):
    """What holds bytes under a name, as ``pathlib.Path`` does; ``str`` gives the name."""

    @property
    def suffix(self) -> str:
        """End of the name, with the dot."""
        ...

    def open(self, mode: Literal["rb"]) -> IO[bytes]:
        """A new handle."""
        ...


# what files are taken for: Pillow would hand an EPS to Ghostscript, a program that it carries
FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP", "JPEG2000", "AVIF", "PPM")
# recognised without a look into the file
IMAGE_SUFFIXES = set(".png .jpg .jpeg .bmp .webp .tif .tiff .gif .jp2 .j2k .avif".split())
FRAMED = {".gif", ".tif", ".tiff"}  # which may hold several
MOST_PIXELS = 2 * 89_478_485  # Pillow's own limit; an A3 page at 900 dpi has 157 million
REMEDY = "convert, restore or remove the file"
# tags of a TIFF
BITS, PHOTOMETRIC = 258, 262


def open_image(path: str | Stored, mode: Mode = "RGB", frame: int = 0) -> Image.Image:
    """Read an image file as :func:`upright` pixels.

    Parameters
    ----------
    path : of the file.
    mode : of the result.
    frame : of a TIFF, a GIF or another file with several, from 0.

    Raises
    ------
    OSError : when there is no such file, or it may not be read.
    ForeignFileError : naming the file, when it is no image, is damaged, has no pixels, more than
        :data:`MOST_PIXELS`, or values of unknown range.
    """
    with _opened(path) as file:
        if frame:
            file.seek(frame)
        check_image(file)  # the header knows the size: nothing is decoded yet
        return upright(file, mode)


def image_size(path: Stored, frame: int = 0) -> tuple[int, int]:
    """Width and height of an image as it is stored; nothing is decoded."""
    with _opened(path) as file:
        if frame:
            file.seek(frame)
        return file.size


def frame_count(path: str | Stored) -> int:
    """Number of images in a file."""
    with _opened(path) as file:
        return int(getattr(file, "n_frames", 1))


def is_image(path: Stored) -> bool:
    """Whether a file is an image: by its suffix, or else by its header."""
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return True
    with contextlib.suppress(ValueError, OSError), _opened(path):
        return True
    return False


@contextlib.contextmanager
def _opened(path: str | Stored) -> Iterator[Image.Image]:
    """An image file; whatever goes wrong with it names it."""
    with warnings.catch_warnings(), foreign(str(path), f"an image ({', '.join(FORMATS)})", REMEDY):
        warnings.simplefilter("ignore")  # of odd metadata, and of sizes below the limit
        # a handle, since Pillow 13 garbles a turned TIFF that it maps into memory by its name
        with (Path(path) if isinstance(path, str) else path).open("rb") as handle:
            try:
                file = Image.open(handle, formats=FORMATS)
            except UnidentifiedImageError:
                raise ValueError("its content is none of these") from None
            with file:
                yield file


def upright(image: Image.Image, mode: Mode = "RGB") -> Image.Image:
    """Turn an image as its EXIF says, and give it 8 bits a channel.

    Transparent pixels show white paper. Grey of 16 bits is scaled, and so are floats from 0 to 1.
    CMYK goes through the ICC profile that the file brings, or else Pillow's conversion.

    Raises
    ------
    ValueError : for whole numbers beyond 16 bits, or floats beyond 1: their range is not known.
    """
    colour = image.info.get("transparency")
    if isinstance(colour, tuple) and any(
        ";16B" in str(tile) for tile in getattr(image, "tile", ())
    ):
        # Pillow keeps the upper 8 bits of a PNG's channels, and all 16 of its transparent colour
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    image.load()
    if image.mode.startswith("I") or image.mode == "F":
        eight = _scaled(image)
        eight.info.update({k: v for k, v in image.info.items() if k in ("exif", "xmp")})
        image = eight
    elif image.mode in ("CMYK", "LAB"):
        image = _from_print(image)
    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)


def check_image(image: Image.Image, name: str = "the image") -> None:
    """Refuse what is no image, and images without pixels or with too many.

    Parameters
    ----------
    image : a Pillow image.
    name : how messages call it.
    """
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"{name} should be a PIL image; got {type(image).__name__}; open files with "
            "compress.data.pixels.open_image"
        )
    check_size(*image.size, name)


def check_size(width: int, height: int, name: str) -> None:
    """Refuse images without pixels or with too many; see :func:`check_image`."""
    if not 0 < width * height <= MOST_PIXELS:
        raise ForeignFileError(
            f"{name} should have 1 to {MOST_PIXELS:,} pixels; its size is {width}x{height}; scale "
            "or replace it"
        )


def _scaled(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, of whole numbers or of floats as 8 bits."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(BITS, (16,))[0]
    values = np.asarray(image)
    top = 1.0 if image.mode == "F" else 2.0**bits - 1
    low, high = values.min(), values.max()
    # a TIFF of mode "I" has 32 bits, or a sign
    if not 0 <= low <= high <= top or (tags and image.mode == "I"):
        expected = "from 0 to 1" if image.mode == "F" else "of 16 bits without a sign"
        raise ValueError(
            f"its grey values should be {expected}; they are {values.dtype.name} from {low:g} to "
            f"{high:g}, whose black and white are not known; save it with 8 bits"
        )
    share = values / np.float32(top)
    transparent = image.info.get("transparency")
    if tags.get(PHOTOMETRIC) == 0:  # white is 0; Pillow turns only those of 8 bits
        share = 1 - share
    elif isinstance(transparent, int):  # the one grey that a PNG shows as paper
        share[values == transparent] = 1
    return Image.fromarray((share * 255 + 0.5).astype(np.uint8))


def _from_print(image: Image.Image) -> Image.Image:
    """CMYK or LAB as RGB."""
    profile = image.info.get("icc_profile", b"")
    if image.mode == "CMYK" and not profile:
        return image.convert("RGB")
    try:
        source = ImageCms.createProfile("LAB") if image.mode == "LAB" else io.BytesIO(profile)
        profiles = ImageCms.ImageCmsProfile(source), ImageCms.createProfile("sRGB")
        made = cast(Image.Image, ImageCms.profileToProfile(image, *profiles, outputMode="RGB"))
    except (ImageCms.PyCMSError, OSError):
        made = image.convert("RGB")  # a profile that is damaged, or of other colours
    made.info["exif"] = image.getexif().tobytes()
    return made
