"""Pictures of visual tokens: a shaded cell lies on what its token sees."""

import io
import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from transformers import UnlimitedOcrImageProcessor

from builders import ocr
from builders.fastocr import paper
from builders.tiers import few
from compress import RTPrune
from compress.checkpoints.applied import Applied
from compress.methods.base import Shown
from compress.methods.fastocr.trace import trace
from compress.methods.rtprune.figures import pruned_page
from compress.methods.rtprune.pages import EncodedPage, PrunedPage, prune_pages
from compress.methods.rtprune.transport import similarity, transport_plans
from compress.models.deepseek_ocr_processor import DeepseekOcrProcessor
from compress.models.deepseek_ocr_views import MODES, Mode, page_views
from compress.models.page_pictures import KEPT, MERGED, MOVE, tokens_on_page
from compress.models.visual import ADAPTERS, ViewOnPage, views_on_page, visual_layouts

pytestmark = pytest.mark.usefixtures("quick_runs")
FIGURES = True

SIZES = [(800, 1200), (1500, 700), (600, 600)]


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def marked(width, height):
    """A white page with a black square at its left, and the square."""
    side = min(width, height) // 10
    box = (0, height // 5, side, height // 5 + side)
    page = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(page).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill="black")
    return page, box


def dark_cells(pixels, tokens):
    """(row, column) of the tokens of ``(3, height, width)`` whose pixels are partly black."""
    cells = torch.nn.functional.unfold(
        (pixels.amax(0) < -0.5).float()[None, None],
        (pixels.shape[1] // tokens[0], pixels.shape[2] // tokens[1]),
        stride=(pixels.shape[1] // tokens[0], pixels.shape[2] // tokens[1]),
    )
    return [divmod(i, tokens[1]) for i in cells[0].amax(0).nonzero()[:, 0].tolist()]


def shaded(picture, page):
    """(x0, y0, x1, y1) in the page's pixels of what is tinted, as a picture of one panel has it."""
    scale = picture.width / page.width
    pixels = np.asarray(picture).astype(int)
    tinted = np.argwhere(pixels.max(2) - pixels.min(2) > 20)
    (top, left), (bottom, right) = tinted.min(0), tinted.max(0) + 1
    return left / scale, top / scale, right / scale, bottom / scale


def covers(outer, inner, slack):
    """Whether a box holds another, and is larger by no more than ``slack`` at any side."""
    signs = (1, 1, -1, -1)
    over = [s * (i - o) for s, i, o in zip(signs, inner, outer, strict=True)]
    return all(-2 <= o <= slack for o in over)


def check_cells(view_number, view, pixels, page, square):
    cells = dark_cells(pixels, (view.rows, view.columns))
    tokens = torch.tensor([[view_number, row, column] for row, column in cells])
    found = shaded(tokens_on_page(page, {view_number: view}, [(tokens, KEPT)]), page)
    x0, y0, x1, y1 = view.box
    cell = max((x1 - x0) / view.columns, (y1 - y0) / view.rows)
    assert covers(found, square, cell + 2), (found, square)


# ---- where a token looks -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "size"),
    few(itertools.product(MODES, SIZES), *zip(MODES, itertools.cycle(SIZES), strict=False)),
    ids=str,
)
def test_the_cell_of_a_token_lies_on_what_it_sees(mode, size):
    page, square = marked(*size)
    processor = DeepseekOcrProcessor(ocr.tokenizer(), MODES[mode])
    found = page_views(page, MODES[mode])
    model = SimpleNamespace(config=ocr.deepseek_ocr().config)
    views = views_on_page(model, processor, page, processor.page_tokens(found.grid))
    check_cells(0, views[0], found.whole, page, square)
    assert (1 in views) == (found.crops is not None)
    if found.crops is not None:
        columns, rows = found.grid
        mosaic = found.crops.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4)
        check_cells(1, views[1], mosaic.flatten(3, 4).flatten(1, 2), page, square)


@pytest.mark.parametrize("crops", [True, False])
def test_unlimited_ocr_pads_as_its_processor_is_set(crops):
    page, square = marked(400, 700)
    images = UnlimitedOcrImageProcessor(
        size={"height": 640, "width": 640}, crop_to_patches=crops, tile_size=640
    )
    pixels = images(page, return_tensors="pt")["pixel_values"][0]
    processor = SimpleNamespace(image_processor=images)
    box = ADAPTERS["unlimited_ocr"].places(processor, *page.size)[0]
    assert (box == (0, 0, 400, 700)) is not crops
    check_cells(0, ViewOnPage(box, 10, 10), pixels, page, square)


# ---- what becomes of the others ------------------------------------------------------------------


def grid_of(rows, columns):
    places = [[0, r, c if c < columns else -1] for r in range(rows) for c in range(columns + 1)]
    return torch.tensor([*places, [0, -1, -1]])


def pruned(method, grid, features):
    pages, nothing = [EncodedPage(grid)], features[:0]
    [(page, _)] = prune_pages(method, pages, [features], [nothing], torch.zeros(8))
    return page


@pytest.mark.parametrize("transport", ["optimal", "nearest"])
def test_a_page_knows_where_its_tokens_went(transport):
    grid = grid_of(3, 4)
    features = torch.randn(len(grid), 8)
    method = RTPrune(keep_tokens=0.5, transport=transport)
    [(page, _)] = prune_pages(
        method, [EncodedPage(grid)], [features], [features[:0]], torch.zeros(8)
    )
    gone, targets, mass = page.moves()
    kept = [i for i in page.kept_indices.tolist() if grid[i, 2] >= 0]
    assert sorted([*kept, *gone.tolist()]) == (grid[:, 2] >= 0).nonzero()[:, 0].tolist()
    scores = similarity(features[kept], features[gone])
    if transport == "nearest":
        assert targets.tolist() == [kept[i] for i in scores.argmax(0)] and set(mass.tolist()) == {1}
    else:
        [plan] = transport_plans(scores[None])
        assert targets.tolist() == [kept[i] for i in plan.argmax(0)]
        torch.testing.assert_close(mass, plan.amax(0))


@pytest.mark.parametrize(
    "knobs", [{"merge": 0.0}, {"select": "norm"}, {"select": "divprune"}, {"keep_tokens": 1.0}]
)
def test_where_nothing_is_moved_nothing_is_said_of_it(knobs):
    grid = grid_of(3, 4)
    features = torch.randn(len(grid), 8)
    method = RTPrune(**{"keep_tokens": 0.5, **knobs})
    [(page, _)] = prune_pages(
        method, [EncodedPage(grid)], [features], [features[:0]], torch.zeros(8)
    )
    assert page.merged is None and [len(part) for part in page.moves()] == [0, 0, 0]
    figure = pruned_page(
        Image.new("RGB", (80, 60), "white"), {0: ViewOnPage((0, 0, 80, 60), 3, 4)}, page
    )
    assert "the others are dropped" in figure.caption
    colours = Image.open(io.BytesIO(figure.image)).getcolors()
    assert len(colours) == (1 if "keep_tokens" in knobs else 2)


def tint(colour):
    """A colour of 110 in 255 over white."""
    return np.array([255 + (part - 255) * 110 / 255 for part in colour])


def test_kept_and_merged_tokens_are_told_apart():
    from compress.methods.rtprune.pages import Merged

    kept = torch.tensor([0, 4, 5, 6, 9])  # token 0, a newline, tokens 5 and 6, a newline
    merged = Merged(torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0.1, 0.9, 0.2, 0.1, 0.1]))
    page = PrunedPage(grid_of(2, 4), kept, 0.4, merged=merged)
    views = {0: ViewOnPage((0, 0, 480, 240), 2, 4)}
    image = Image.new("RGB", (480, 240), "white")
    figure = pruned_page(image, views, page)
    assert (
        "3 of 8 visual tokens stay (green)" in figure.caption
        and "each of the 5 that" in figure.caption
    )
    pixels = np.asarray(Image.open(io.BytesIO(figure.image))).astype(int)
    for place, colour in (((0, 0), KEPT), ((1, 0), KEPT), ((1, 1), KEPT)):
        corner = pixels[place[0] * 120 + 5, place[1] * 120 + 5]
        assert np.abs(corner - tint(colour)).max() < 2
    for place in ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3)):
        corner = pixels[place[0] * 120 + 5, place[1] * 120 + 5]
        assert np.abs(corner - tint(MERGED)).max() < 2
    # token 2 goes to token 0: a line along the middle of the first row, a dot at its end
    assert np.abs(pixels[60, 240] - MOVE).max() < 60 and np.abs(pixels[62, 60] - MOVE).max() < 60


# ---- the pictures of a report --------------------------------------------------------------------


PAGE = ocr.page(300, 200, 0, 0.6)


def figures_of(method, model, processor, prompt="read", others=()):
    """What a method draws of the page, by name, and its notes."""
    [section] = method.sections(Shown(model, processor, PAGE, prompt, others, []))
    return {figure.name: figure for figure in section.figures}, section.notes


def test_crops_get_a_panel_of_their_own():
    model, method = ocr.deepseek_ocr(), RTPrune(keep_tokens=0.5)
    crops = DeepseekOcrProcessor(ocr.tokenizer(), ocr.SMALL)
    kept = figures_of(method, model, crops)[0]["kept"]
    assert "left the tokens of the whole page, right those of its crops" in kept.caption
    assert Image.open(io.BytesIO(kept.image)).size == (2 * 300 + 8, 200)
    whole = DeepseekOcrProcessor(ocr.tokenizer(), Mode(256))
    kept = figures_of(method, model, whole)[0]["kept"]
    assert kept.caption.endswith("on the first page")
    assert Image.open(io.BytesIO(kept.image)).size == (300, 200)


def test_queries_are_not_drawn():
    grid = visual_layouts(ocr.deepseek_ocr2(), ocr.deepseek2_prompt(["a"]))[0].grid
    kept = PrunedPage(grid, torch.arange(30), 0.1)
    views = ADAPTERS["deepseek_ocr2"].places(None, 300, 200)
    figure = pruned_page(PAGE, views, kept)
    assert "30 of 400 visual tokens stay" in figure.caption
    assert "queries, which have no place" in figure.caption
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(figure.image))), np.asarray(PAGE))


def test_the_film_is_over_what_rtprune_left(monkeypatch):
    monkeypatch.setattr("compress.methods.fastocr.figures.NEW_TOKENS", 5)
    model = ocr.deepseek_ocr()
    model.generation_config.eos_token_id = None
    processor = DeepseekOcrProcessor(ocr.tokenizer(), ocr.SMALL)
    pruning, looking = RTPrune(keep_tokens=0.5), paper(keep_visual=0.2, focal_layers=(0,))
    inputs = dict(processor([PAGE], ["read"]))
    with Applied(model, [pruning]) as applied:
        _, layout, seen = trace(looking, model, inputs, 5)
        [left] = applied.handles["rtprune"].pages
    assert torch.equal(layout.grid, left.grid[left.kept_indices])
    assert [s is None for s in seen] == [True, False, False, False]
    assert all(len(s) == -(-len(layout.grid) // 5) for s in seen[1:])
    summaries = paper(choose="summaries", keep_visual=0.2, min_visual=0)
    _, layout, seen = trace(summaries, model, inputs, 5)
    least, size = -(-len(layout.grid) // 5), len(layout.grid)
    assert len(seen) == 4 and all(least <= len(s) and s[-1] < size for s in seen)
    both, _ = figures_of(looking, model, processor, others=[pruning])
    alone, _ = figures_of(looking, model, processor)
    assert "the tokens that rtprune left of it; left the tokens" in both["strip"].caption
    assert "rtprune" not in alone["strip"].caption
    assert both["strip"].image != alone["strip"].image
    assert both["film"].image.startswith(b"GIF") and alone["film"].image.startswith(b"GIF")


def test_a_film_that_cannot_be_drawn_has_words(monkeypatch):
    model = ocr.deepseek_ocr()
    processor = DeepseekOcrProcessor(ocr.tokenizer(), ocr.SMALL)
    looking = paper(keep_visual=0.2, focal_layers=(0,))
    monkeypatch.setattr("compress.methods.fastocr.figures.NEW_TOKENS", 2)
    figures, [note] = figures_of(looking, model, processor, prompt=None)
    assert figures == {} and note.startswith("The fixation while the page is written: every step")
