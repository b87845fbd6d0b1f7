"""Open page images, with one clear message for each thing that can be wrong with one."""

from pathlib import Path

from PIL import Image, ImageOps

LONGEST_SIDE = 16_384  # pixels; an A3 page at 900 dpi has 14,880


def open_image(path: str | Path) -> Image.Image:
    """Read an image file as upright RGB pixels.

    Raises
    ------
    FileNotFoundError : naming the file.
    ValueError : when it is no image, is damaged, has no pixels or has too many.
    """
    try:
        with Image.open(path) as file:
            check_image(file, str(path))  # the header knows the size: nothing is decoded yet
            return ImageOps.exif_transpose(file).convert("RGB")
    except FileNotFoundError:
        raise FileNotFoundError(f"an image is expected at {path}; there is no such file") from None
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"{path} has more pixels than are read: {error}; scale it down to at most "
            f"{LONGEST_SIDE} pixels a side"
        ) from error
    except (OSError, SyntaxError) as error:  # Pillow: SyntaxError for a broken header
        raise ValueError(
            f"{path} should be an image (PNG, JPEG, TIFF, ...) but cannot be read as one: {error}; "
            "convert or restore the file"
        ) from error


def check_image(image: Image.Image, name: str = "the image") -> None:
    """Refuse what is no image, and images without pixels or with too many.

    Parameters
    ----------
    image : a Pillow image.
    name : how messages call it.

    Raises
    ------
    TypeError : when it is no Pillow image.
    ValueError : when it is of zero size, or wider or higher than :data:`LONGEST_SIDE`.
    """
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"{name} should be a PIL image; got {type(image).__name__}; open files with "
            "compress.models.page_images.open_image"
        )
    width, height = image.size
    if not width or not height:
        raise ValueError(f"{name} should have pixels; its size is {width}x{height}; replace it")
    if max(width, height) > LONGEST_SIDE:
        raise ValueError(
            f"{name} should be at most {LONGEST_SIDE} pixels a side; its size is {width}x{height}; "
            "scale it down"
        )
