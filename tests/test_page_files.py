"""Pages of files: which there are, and that none is open before it is asked for."""

import pytest
from PIL import Image

from compress.data.page_files import find_pages, pdf_page, text_files


@pytest.fixture
def folder(tmp_path):
    sheets = [Image.new("RGB", (60, 90), (20 * k, 0, 0)) for k in range(5)]
    sheets[0].save(tmp_path / "scan.tif", save_all=True, append_images=sheets[1:3])
    sheets[0].save(tmp_path / "doc.pdf", save_all=True, append_images=sheets[1:])
    for name in ("page10.png", "page9.png", "notes/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        sheets[1].save(tmp_path / name)
    (tmp_path / "notes" / "a.txt").write_text("no page")
    return tmp_path


def names(pages, folder):
    return [page.name.removeprefix(f"{folder}/") for page in pages]


def test_a_folder_is_searched_and_files_of_several_pages_are_taken_apart(folder):
    assert names(find_pages([folder]), folder) == [
        *(f"doc.pdf, page {k}" for k in range(1, 6)),
        *("notes/a.png", "page9.png", "page10.png"),
        *(f"scan.tif, page {k}" for k in range(1, 4)),
    ]
    # once, however often it is named
    assert len(find_pages([folder, folder / "page9.png"])) == 11


@pytest.mark.parametrize(
    ("numbers", "wanted"),
    [("1-3", [1, 2, 3]), ("5, 1-2", [1, 2, 5]), ("4-", [4, 5]), ("3", [3]), ("2-2,2", [2])],
)
def test_ranges_of_pages(folder, numbers, wanted):
    found = find_pages([folder / "doc.pdf"], numbers)
    assert names(found, folder) == [f"doc.pdf, page {k}" for k in wanted]
    red = [page.open().getpixel((9, 9))[0] for page in found]
    assert red == pytest.approx([20 * (k - 1) for k in wanted], abs=3)


@pytest.mark.parametrize("numbers", ["0", "3-1", "-2", "a", "", "1,,2", "1-2-3", "1.5"])
def test_ranges_that_are_none(folder, numbers):
    with pytest.raises(ValueError, match="pages are numbers from 1"):
        find_pages([folder / "doc.pdf"], numbers)


def test_pages_that_a_file_does_not_have(folder):
    with pytest.raises(ValueError, match="doc.pdf has 5 pages, and page 7 is asked for"):
        find_pages([folder / "doc.pdf"], "1-3,7")
    with pytest.raises(ValueError, match="are chosen .2.; got none"):
        find_pages([folder / "page9.png"], "2")


def test_numbers_of_pages_are_of_files_that_may_have_several(folder):
    found = find_pages([folder / "page9.png", folder / "doc.pdf"], "2")
    assert names(found, folder) == ["page9.png", "doc.pdf, page 2"]


def test_a_pdf_is_rendered_at_a_resolution_and_no_larger_than_images_may_be(folder):
    assert find_pages([folder / "doc.pdf"], "1", dpi=288)[0].open().size == (240, 360)
    assert pdf_page(folder / "doc.pdf", 1, longest=1288).size[1] == 1288
    with pytest.raises(ValueError, match="page 1 of .*doc.pdf should have 1 to .* pixels"):
        pdf_page(folder / "doc.pdf", 1, dpi=20_000)
    with pytest.raises(ValueError, match="should have a page 6; it has 5"):
        pdf_page(folder / "doc.pdf", 6)


def test_damaged_files_are_pages_whose_opening_names_them(folder):
    for name in ("doc.pdf", "scan.tif", "page9.png"):
        (folder / name).write_bytes(b"damaged")
        (page,) = find_pages([folder / name])
        with pytest.raises(ValueError, match=name):
            page.open()


def test_paths_without_pages(folder):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        find_pages([folder / "nowhere"])
    (folder / "notes" / "a.png").unlink()
    with pytest.raises(ValueError, match="notes should hold page images or PDFs"):
        find_pages([folder / "notes"])


def test_texts_are_laid_out_as_the_files_are(folder):
    found = text_files(find_pages([folder], "1"))
    assert sorted(map(str, found.values())) == [
        *("doc_page_1.md", "notes/a.md", "page10.md", "page9.md", "scan_page_1.md")
    ]
    Image.new("L", (4, 4)).save(folder / "page9.jpg")
    with pytest.raises(ValueError, match="page9.jpg and .*page9.png would both become page9.md"):
        text_files(find_pages([folder]))
