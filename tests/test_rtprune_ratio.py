"""RTPrune's dynamic ratio, against loops that follow its definition."""

import pytest
import torch
from scipy.signal import correlate2d

from compress.methods.rtprune import RTPrune
from compress.methods.rtprune.ratio import distinctness, keep_fraction, textual_density


def _density(pixels, rows, columns):
    """Patch by patch, as published."""
    sobel = [[1, 0, -1], [2, 0, -2], [1, 0, -1]]
    grey = 0.299 * pixels[0] + 0.587 * pixels[1] + 0.114 * pixels[2]
    height, width = grey.shape[0] // rows, grey.shape[1] // columns
    shares = []
    for r in range(rows):
        for c in range(columns):
            patch = grey[r * height : (r + 1) * height, c * width : (c + 1) * width].numpy()
            x = correlate2d(patch, sobel, "same")
            y = correlate2d(patch, torch.tensor(sobel).T.numpy(), "same")
            shares.append(((x**2 + y**2) ** 0.5 > 0.2).mean())
    return sum(shares) / len(shares)


@pytest.mark.parametrize("grid", [(1, 1), (4, 3), (5, 7)])
def test_density_is_the_published_one(grid):
    pages = torch.rand(3, 3, 40, 43) * 2 - 1
    pages[1] *= torch.rand(40, 43) < 0.1  # mostly grey
    pages[2, :, 20:] = 1.0
    expected = [_density(page.double(), *grid) for page in pages]
    torch.testing.assert_close(textual_density(pages, grid), torch.tensor(expected).float())


def test_border_pixels_of_white_patches_count_as_edges():
    white = torch.ones(1, 3, 30, 40)
    # patches of 10x10: 36 border pixels each
    assert textual_density(white, (3, 4)).item() == pytest.approx(0.36)
    assert textual_density(-white, (3, 4)).item() == pytest.approx(0.36)
    assert textual_density(torch.zeros(1, 3, 30, 40), (3, 4)).item() == 0


def test_density_grows_with_the_text():
    pages = torch.ones(4, 3, 64, 64)
    for lines, page in enumerate(pages):
        page[:, 4 : 4 + 12 * lines : 4] = -1
    densities = textual_density(pages, (4, 4))
    assert densities.diff().gt(0).all() and densities.max() <= 1


def _distinctness(x):
    n, total = len(x), 0.0
    for i in range(n):
        cosines = [torch.cosine_similarity(x[i], x[j], dim=0) ** 2 for j in range(n) if j != i]
        total += sum(cosines) / (n - 1)
    return 1 - total / n


def test_distinctness_is_the_published_one():
    features = torch.randn(2, 7, 5)
    expected = torch.stack([_distinctness(page.double()) for page in features])
    torch.testing.assert_close(distinctness(features), expected.float())


def test_distinctness_of_equal_and_orthogonal_tokens():
    same = torch.randn(1, 6) * torch.tensor([[1.0], [-2.0], [3.0]])
    assert distinctness(same).item() == pytest.approx(0, abs=1e-6)
    assert distinctness(torch.eye(4) * 3).item() == pytest.approx(1)
    assert distinctness(torch.randn(2, 1, 6)).tolist() == [1, 1]


def test_keep_fraction():
    d, s = torch.tensor([0.0, 0.2, 1.0, 0.5]), torch.tensor([0.3, 0.5, 0.1, 0.0])
    torch.testing.assert_close(keep_fraction(d, s), 1 - (1 - d) * (1 - s))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_results_have_the_dtype_of_the_inputs(dtype):
    pages, features = torch.rand(2, 3, 16, 16).to(dtype), torch.randn(2, 9, 8).to(dtype)
    density, differ = textual_density(pages, (2, 2)), distinctness(features)
    fraction = keep_fraction(density, differ)
    assert density.dtype == differ.dtype == fraction.dtype == dtype
    # the sums are taken in float32
    assert torch.equal(density, textual_density(pages.float(), (2, 2)).to(dtype))
    assert torch.equal(differ, distinctness(features.float()).to(dtype))


def test_errors_name_what_is_expected():
    with pytest.raises(ValueError, match=r"\(batch, 3, height, width\).*got \(3, 8, 8\)"):
        textual_density(torch.zeros(3, 8, 8), (2, 2))
    with pytest.raises(ValueError, match="9x2 patches for pages of 8x8"):
        textual_density(torch.zeros(1, 3, 8, 8), (9, 2))


def test_features_without_tokens_are_refused():
    with pytest.raises(ValueError, match=r"\(\.\.\., tokens, dim\) are expected; got \(8,\)"):
        distinctness(torch.ones(8))
    with pytest.raises(ValueError, match="at least one row and one column is expected; got 0x4"):
        textual_density(torch.ones(1, 3, 8, 8), (0, 4))


@pytest.mark.parametrize(
    ("sizes", "modes"),
    [
        (((400, 421), (256, 273), (64, 73), (256, 273)), ["Tiny", "Base"]),
        (((400, 421), (196, 211)), []),
        (((256, 257),), []),  # DeepSeek-OCR-2, without newlines
    ],
)
def test_pages_of_a_mode_below_large_bring_the_published_figures(sizes, modes):
    pages = [{"prunable": grid, "visual_tokens": tokens} for grid, tokens in sizes]
    facts = {"pages": pages, "total": {"visual_tokens": 100, "visual_kept": 80}}
    counts = RTPrune().count([facts])

    assert counts["tokens_kept"] == 0.8
    said = " ".join(RTPrune().warnings(counts))
    assert [mode for mode in ("Tiny", "Small", "Base") if mode in said] == modes
    assert ("from 84.83 to 81.48 in Base (256 tokens)" in said) == ("Base" in modes)
