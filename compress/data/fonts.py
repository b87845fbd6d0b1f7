"""The fonts of rendered pages: matplotlib's own files, opened by Pillow."""

from functools import cache
from pathlib import Path

from PIL import ImageFont

from compress.common.extras import extra

# family: (regular, bold); matplotlib's cmr10 is left out, it draws < > " \ _ { | } as other glyphs
FONTS = {
    "DejaVu Sans": ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"),
    "DejaVu Sans Mono": ("DejaVuSansMono.ttf", "DejaVuSansMono-Bold.ttf"),
    "STIXGeneral": ("STIXGeneral.ttf", "STIXGeneralBol.ttf"),
    "DejaVu Serif": ("DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf"),
}
UNSEEN_FONT = "DejaVu Serif"  # for the test split only
SEEN_FONTS = tuple(name for name in FONTS if name != UNSEEN_FONT)


def font_file(family: str, bold: bool = False) -> Path:
    """Path of a family's file."""
    with extra("report", "rendering pages"):
        import matplotlib
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / FONTS[family][bold]


@cache
def load_font(family: str, size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """A font, ``size`` pixels to the em."""
    # the basic layout engine is part of every Pillow build, so pages do not depend on the build
    return ImageFont.truetype(font_file(family, bold), size, layout_engine=ImageFont.Layout.BASIC)
