"""Rendered text pages whose ground truth is exact: what the built-in readers read."""

import math
import random
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

from compress.data.fonts import FONTS, SEEN_FONTS, UNSEEN_FONT, load_font
from compress.data.page_text import LONGEST, SHORTEST, SPLITS, make_line, make_word

HEADING_SCALE = 1.2  # heading's font size over the text's
BLOCK_GAP = 0.5  # white between blocks, in line heights
CELL_PADDING = 3  # pixels on each side of a table cell's text
TRIES = 100  # draws of a text or a layout that is to fit, before the page is refused
MOST_TILT, MOST_NOISE, MOST_INK, LEAST_PAPER = 1.0, 10.0, 90, 210  # at wear 1

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Difficulty:
    """What the pages of one difficulty have in common; ranges are (lowest, highest), inclusive.

    A curriculum is a sequence of these: from one short line on a strip to full pages.

    Parameters
    ----------
    size : width and height of the page in pixels.
    lines : lines of text on a page; a table's row is a line.
    characters : of a line; one that would be too wide gets fewer, but never less than the lowest.
    font_sizes : pixels to the em; the largest that fits, at most the drawn one.
    fonts : families to draw from (see ``compress.data.fonts``).
    spacing : line height over font size.
    margin : pixels, drawn for each page.
    paragraph : lines of a paragraph.
    columns : of text.
    prose : share of words among words and random strings.
    headings, tables : the probability that the next block is one.
    wear : 0 is black on white and upright; 1 tilts by up to 1 degree, adds noise of up to 10 grey
        levels, and lightens the ink and darkens the paper.
    """

    size: tuple[int, int]
    lines: tuple[int, int]
    characters: tuple[int, int]
    font_sizes: tuple[int, int]
    fonts: tuple[str, ...] = SEEN_FONTS
    spacing: tuple[float, float] = (1.15, 1.5)
    margin: tuple[int, int] = (4, 10)
    paragraph: tuple[int, int] = (2, 6)
    columns: tuple[int, int] = (1, 1)
    prose: float = 0.5
    headings: float = 0.0
    tables: float = 0.0
    wear: float = 0.0

    def __post_init__(self) -> None:
        unknown = [name for name in self.fonts if name not in FONTS]
        if unknown or not self.fonts:
            raise ValueError(f"fonts must be among {', '.join(FONTS)}; got {self.fonts}")
        if self.characters[0] < SHORTEST:
            raise ValueError(
                f"a line has at least {SHORTEST} characters; got characters={self.characters}; "
                "raise the lowest"
            )
        for name in ("lines", "characters", "font_sizes", "spacing", "margin", "paragraph"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(
                    f"{name} must be (lowest, highest), above 0; got {(low, high)}; swap or raise"
                )
        for name in ("prose", "headings", "tables", "wear"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"{name} must be between 0 and 1; got {getattr(self, name)}; correct it"
                )
        if self.columns not in ((1, 1), (1, 2), (2, 2)):
            raise ValueError(f"columns must be (1, 1), (1, 2) or (2, 2); got {self.columns}")


LINE = Difficulty((160, 32), (1, 1), (8, 12), (14, 18), margin=(4, 7))
# what the readers are measured on: with tokens of 16x16 pixels, 13x24 = 312 of them
PAGE = Difficulty((208, 384), (12, 16), (12, 18), (14, 20), wear=0.5)
# the same for a model that sees squares: 14x14 = 196 of them
SQUARE_PAGE = Difficulty(
    (224, 224), (12, 13), (12, 18), (12, 16), spacing=(1.05, 1.25), margin=(3, 8), wear=0.5
)
DOCUMENT = Difficulty(
    (512, 640),
    (16, 30),
    (10, 40),
    (13, 18),
    columns=(1, 2),
    headings=0.3,
    tables=0.2,
    wear=1.0,
)


@dataclass(frozen=True)
class Block:
    """A piece of a page.

    ``kind`` is "heading", "paragraph" or "table"; ``text`` has the lines as drawn (of a table: the
    cells separated by spaces); ``html`` is the table's ground truth, and empty for other kinds;
    ``box`` is (x0, y0, x1, y1) in pixels, x1 and y1 excluded; ``order`` is the place in reading
    order, from 0.
    """

    kind: str
    text: str
    html: str
    box: Box
    order: int

    @property
    def markdown(self) -> str:
        """The block as it stands in the page's text."""
        return {"heading": f"# {self.text}", "table": self.html}.get(self.kind, self.text)


@dataclass(frozen=True)
class Page:
    """An 8-bit grey image, its text as Markdown in reading order, and its blocks."""

    image: Image.Image
    text: str
    blocks: tuple[Block, ...]


@dataclass
class _Plan:
    """A block before its text is drawn: how many lines (of a table: rows) it has."""

    kind: str
    lines: int
    cells: int = 1

    def height(self, size: int, spacing: float) -> float:
        """Pixels from top to bottom."""
        if self.kind == "heading":
            return math.ceil(size * HEADING_SCALE) * spacing
        extra = 2 * CELL_PADDING if self.kind == "table" else 0
        return self.lines * (size * spacing + extra)


@dataclass
class _Sheet:
    """A page in the making."""

    rng: random.Random
    difficulty: Difficulty
    split: str
    family: str
    size: int
    spacing: float
    ink: int
    image: Image.Image
    blocks: list[Block] = field(default_factory=list)

    def fitting(self, longest: int, shortest: int, width: float, bold: bool, line: bool) -> str:
        """Draw a line or a word that fits a width, with fewer characters if need be."""
        font = load_font(self.family, self.font_size(bold), bold)
        make = make_line if line else make_word
        length = self.rng.randint(shortest, longest)
        for _ in range(TRIES):
            text = make(self.rng, length, self.split, self.difficulty.prose)
            if font.getlength(text) <= width:
                return text
            length = max(shortest, length - 1)
        raise ValueError(
            f"{shortest} characters of {self.family} at {self.size} pixels do not fit "
            f"{width:.0f} pixels; ask for fewer characters, a smaller font or a wider page"
        )

    def font_size(self, heading: bool) -> int:
        """Pixels to the em."""
        return math.ceil(self.size * HEADING_SCALE) if heading else self.size

    def write(self, text: str, left: float, top: float, bold: bool = False) -> Box:
        """Draw a line of text into the strip that begins at ``top``; returns the ink's box."""
        size = self.font_size(bold)
        font = load_font(self.family, size, bold)
        draw = ImageDraw.Draw(self.image)
        # 0.8 of an em above the baseline and 0.25 below hold every glyph of the alphabet
        baseline = round(top + size * (0.8 + (self.spacing - 1.05) / 2))
        draw.text((round(left), baseline), text, fill=self.ink, font=font, anchor="ls")
        x0, y0, x1, y1 = draw.textbbox((round(left), baseline), text, font=font, anchor="ls")
        return math.floor(x0), math.floor(y0), math.ceil(x1), math.ceil(y1)

    def add(self, kind: str, text: str, html: str, boxes: list[Box]) -> None:
        """Append a block."""
        x0, y0, x1, y1 = zip(*boxes, strict=True)
        box = min(x0), min(y0), max(x1), max(y1)
        self.blocks.append(Block(kind, text, html, box, order=len(self.blocks)))

    def prose(self, plan: _Plan, left: float, top: float, width: float) -> None:
        """A heading or a paragraph."""
        heading = plan.kind == "heading"
        low, high = self.difficulty.characters
        if heading:
            low, high = SHORTEST, max(SHORTEST, round(high / HEADING_SCALE / 1.2))
        texts = [self.fitting(high, low, width, heading, line=True) for _ in range(plan.lines)]
        pitch = self.font_size(heading) * self.spacing
        boxes = [self.write(t, left, top + i * pitch, heading) for i, t in enumerate(texts)]
        self.add(plan.kind, "\n".join(texts), "", boxes)

    def table(self, plan: _Plan, left: float, top: float, width: float) -> None:
        """A table with rules between the rows and, half of the time, between the columns."""
        across, down = width / plan.cells, plan.height(self.size, self.spacing) / plan.lines
        inner = across - 2 * CELL_PADDING
        rows = [
            [self.fitting(LONGEST, SHORTEST, inner, False, line=False) for _ in range(plan.cells)]
            for _ in range(plan.lines)
        ]
        for i, row in enumerate(rows):
            for j, cell in enumerate(row):
                self.write(cell, left + j * across + CELL_PADDING, top + i * down + CELL_PADDING)
        x0, y0 = round(left), round(top)
        x1, y1 = round(left + width) - 1, round(top + plan.lines * down) - 1
        draw = ImageDraw.Draw(self.image)
        for y in [y0, y1, *(round(top + i * down) for i in range(1, plan.lines))]:
            draw.line((x0, y, x1, y), fill=self.ink)
        if self.rng.random() < 0.5:
            for x in [x0, x1, *(round(left + j * across) for j in range(1, plan.cells))]:
                draw.line((x, y0, x, y1), fill=self.ink)
        html = "".join(f"<tr>{''.join(f'<td>{c}</td>' for c in row)}</tr>" for row in rows)
        text = "\n".join(" ".join(row) for row in rows)
        self.add("table", text, f"<table>{html}</table>", [(x0, y0, x1 + 1, y1 + 1)])


def _plan(rng: random.Random, difficulty: Difficulty, lines: int) -> list[_Plan]:
    """Blocks for one column that have so many lines in all."""
    plans: list[_Plan] = []
    while lines:
        if lines >= 3 and rng.random() < difficulty.tables:
            plan = _Plan("table", rng.randint(2, min(5, lines)), cells=rng.randint(2, 3))
        elif lines >= 2 and rng.random() < difficulty.headings:
            plan = _Plan("heading", 1)
        else:
            low, high = difficulty.paragraph
            plan = _Plan("paragraph", min(lines, rng.randint(low, high)))
        plans.append(plan)
        lines -= plan.lines
    return plans


def _tallest(columns: list[list[_Plan]], size: int, spacing: float) -> float:
    """Pixels from top to bottom of the longest column."""
    gap = BLOCK_GAP * size * spacing
    return max(sum(plan.height(size, spacing) + gap for plan in column) - gap for column in columns)


def _fitting_plans(
    rng: random.Random, difficulty: Difficulty, lines: int, columns: int, height: int
) -> list[list[_Plan]]:
    """Blocks of each column that fit at least at the smallest size and spacing."""
    shares = [lines // columns + (i < lines % columns) for i in range(columns)]
    size, spacing = difficulty.font_sizes[0], difficulty.spacing[0]
    for _ in range(TRIES):
        plans = [_plan(rng, difficulty, share) for share in shares]
        if _tallest(plans, size, spacing) <= height:
            return plans
    raise ValueError(
        f"{lines} lines of {size} pixels do not fit a page {difficulty.size[1]} pixels high; "
        "ask for fewer lines, a smaller font or a higher page"
    )


def page(seed: int, index: int, difficulty: Difficulty, split: str) -> Page:
    """Draw a page: a pure function of its arguments.

    No word (whatever stands between white space) of one split ever occurs in another.

    Parameters
    ----------
    seed, index : which page.
    difficulty : what it looks like.
    split : "train", "validation" or "test"; the unseen font is for "test" only.

    Raises
    ------
    ValueError : for another split, the unseen font elsewhere, or text that cannot fit the page.
    """
    if split not in SPLITS:
        raise ValueError(f"splits are {', '.join(SPLITS)}; got {split!r}; name one of them")
    if UNSEEN_FONT in difficulty.fonts and split != "test":
        raise ValueError(
            f"{UNSEEN_FONT} is kept unseen until the test; got it for split {split!r}; "
            f"use fonts among {', '.join(SEEN_FONTS)}"
        )
    rng = random.Random(f"{split}/{seed}/{index}")
    width, height = difficulty.size
    margin = rng.randint(*difficulty.margin)
    lines = rng.randint(*difficulty.lines)
    columns = min(rng.randint(*difficulty.columns), lines)
    size, spacing = rng.randint(*difficulty.font_sizes), rng.uniform(*difficulty.spacing)
    plans = _fitting_plans(rng, difficulty, lines, columns, height - 2 * margin)
    while _tallest(plans, size, spacing) > height - 2 * margin:
        if size > difficulty.font_sizes[0]:
            size -= 1
        else:
            spacing = difficulty.spacing[0]
    wear = difficulty.wear
    paper = round(255 - wear * rng.random() * (255 - LEAST_PAPER))
    ink = round(wear * rng.random() * MOST_INK)
    tilt = wear * rng.uniform(-MOST_TILT, MOST_TILT)
    noise = wear * rng.random() * MOST_NOISE
    image = Image.new("L", difficulty.size, paper)
    family = rng.choice(difficulty.fonts)
    sheet = _Sheet(rng, difficulty, split, family, size, spacing, ink, image)
    slack = height - 2 * margin - _tallest(plans, size, spacing)
    first = margin + rng.random() * slack
    gutter = 2 * margin
    across = (width - 2 * margin - (columns - 1) * gutter) / columns
    for number, column in enumerate(plans):
        top = first
        for plan in column:
            draw = sheet.table if plan.kind == "table" else sheet.prose
            draw(plan, margin + number * (across + gutter), top, across)
            top += plan.height(size, spacing) + BLOCK_GAP * size * spacing
    text = "\n\n".join(block.markdown for block in sheet.blocks)
    blocks = tuple(_turned(block, tilt, difficulty.size) for block in sheet.blocks)
    return Page(_worn(image, tilt, noise, paper, rng.getrandbits(64)), text, blocks)


def _worn(image: Image.Image, tilt: float, noise: float, paper: int, seed: int) -> Image.Image:
    """Turn a page by so many degrees, and add noise of so many grey levels."""
    if tilt:
        image = image.rotate(tilt, Image.Resampling.BICUBIC, fillcolor=paper)
    if noise:
        grain = np.random.default_rng(seed).normal(0, noise, (image.height, image.width))
        image = Image.fromarray((np.asarray(image) + grain).round().clip(0, 255).astype(np.uint8))
    return image


def _turned(block: Block, tilt: float, size: tuple[int, int]) -> Block:
    """The block with the upright box around its turned one, cut at the page's border."""
    if not tilt:
        return block
    x0, y0, x1, y1 = block.box
    middle = (size[0] / 2, size[1] / 2)
    cos, sin = math.cos(math.radians(tilt)), math.sin(math.radians(tilt))
    corners = [
        (
            middle[0] + (x - middle[0]) * cos + (y - middle[1]) * sin,
            middle[1] - (x - middle[0]) * sin + (y - middle[1]) * cos,
        )
        for x in (x0, x1)
        for y in (y0, y1)
    ]
    xs, ys = zip(*corners, strict=True)
    box = (
        max(0, math.floor(min(xs))),
        max(0, math.floor(min(ys))),
        min(size[0], math.ceil(max(xs))),
        min(size[1], math.ceil(max(ys))),
    )
    return Block(block.kind, block.text, block.html, box, block.order)
