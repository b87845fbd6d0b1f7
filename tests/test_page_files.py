"""Pages of files: which there are, and that none is open before it is asked for."""

import io
import pickle
import tarfile
import zipfile
from pathlib import Path

import pypdfium2
import pytest
from PIL import Image

from compress.data.page_archives import Row
from compress.data.page_files import common_root, find_pages, pdf_page, text_file
from compress.data.pixels import open_image


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
    assert len(list(find_pages([folder, folder / "page9.png"]))) == 11
    (folder / "again").symlink_to(folder / "notes")
    (folder / "notes" / "a.jsonl").write_text('"a.png"\n"../again/a.png"\n"b.png"\n"b\\u0000"\n')
    ways = [folder / "notes" / "a.jsonl", folder / "again" / "a.png", folder / "notes", folder]
    found = names(find_pages(ways, "1"), folder)
    assert found[:3] == ["notes/a.png", "notes/b.png", "notes/b\0"]
    assert found[3:] == ["doc.pdf, page 1", "page9.png", "page10.png", "scan.tif, page 1"]


@pytest.mark.parametrize(
    ("numbers", "wanted"),
    [("1-3", [1, 2, 3]), ("5, 1-2", [1, 2, 5]), ("4-", [4, 5]), ("3", [3]), ("2-2,2", [2])],
)
def test_ranges_of_pages(folder, numbers, wanted):
    found = list(find_pages([folder / "doc.pdf"], numbers))
    assert names(found, folder) == [f"doc.pdf, page {k}" for k in wanted]
    red = [page.open().getpixel((9, 9))[0] for page in found]
    assert red == pytest.approx([20 * (k - 1) for k in wanted], abs=3)


@pytest.mark.parametrize("numbers", ["0", "3-1", "-2", "a", "", "1,,2", "1-2-3", "1.5"])
def test_ranges_that_are_none(folder, numbers):
    with pytest.raises(ValueError, match="pages are numbers from 1"):
        list(find_pages([folder / "doc.pdf"], numbers))


def errors_of(pages, folder):
    """What opening says, by page; None where there is an image."""
    said = {}
    for page in pages:
        try:
            page.open()
            said[page.name.removeprefix(f"{folder}/")] = None
        except ValueError as error:
            said[page.name.removeprefix(f"{folder}/")] = str(error).replace(f"{folder}/", "")
    return said


@pytest.mark.parametrize(
    ("name", "count", "there", "missing"),
    [("doc.pdf", 5, [1, 3, 4], [9]), ("scan.tif", 3, [1, 3], [4, 9])],
)
def test_what_a_file_does_not_have_is_a_page_that_cannot_be_opened(
    folder, name, count, there, missing
):
    said = errors_of(find_pages([folder / name], "1,3-4,9-"), folder)
    assert [*said] == [f"{name}, page {k}" for k in there + missing]
    for number, error in zip(there + missing, said.values(), strict=True):
        expected = f"{name} has {count} pages, and page {number} is asked for; choose others"
        assert error is None if number in there else error.startswith(expected)


def test_numbers_of_pages_of_images_that_have_one(folder):
    with pytest.raises(ValueError, match="are chosen .2.; got none"):
        list(find_pages([folder / "page9.png"], "2"))


def test_numbers_of_pages_are_of_files_that_may_have_several(folder):
    found = find_pages([folder / "page9.png", folder / "doc.pdf"], "2")
    assert names(found, folder) == ["page9.png", "doc.pdf, page 2"]


def test_a_pdf_is_rendered_at_a_resolution_and_no_larger_than_images_may_be(folder):
    assert next(find_pages([folder / "doc.pdf"], "1", dpi=288)).open().size == (240, 360)
    assert pdf_page(folder / "doc.pdf", 1, longest=1288).size[1] == 1288
    with pytest.raises(ValueError, match="page 1 of .*doc.pdf should have 1 to .* pixels"):
        pdf_page(folder / "doc.pdf", 1, dpi=20_000)
    with pytest.raises(ValueError, match="should have a page 6; it has 5"):
        pdf_page(folder / "doc.pdf", 6)


@pytest.mark.parametrize("numbers", [None, "2-", "4,2", "2,9999999999-"])
def test_damaged_files_are_one_page_whose_opening_names_them(folder, numbers):
    pdf = folder / "doc.pdf"
    whole, first = pdf.read_bytes(), ", page 2" if numbers else ""
    for name in ("scan.tif", "page9.png"):
        (folder / name).write_bytes(b"damaged")
    without_pages = io.BytesIO()
    pypdfium2.PdfDocument.new().save(without_pages)
    for content in (whole[: len(whole) // 3], without_pages.getvalue(), b"", b"damaged"):
        pdf.write_bytes(content)
        said = errors_of(
            find_pages([pdf, folder / "scan.tif", folder / "page9.png"], numbers), folder
        )
        assert [*said] == [f"doc.pdf{first or ', page 1'}", f"scan.tif{first}", "page9.png"]
        assert said.popitem()[1].startswith("page9.png should hold an image")
        assert said.pop(f"scan.tif{first}").startswith("scan.tif should hold an image")
        assert said.popitem()[1].startswith("doc.pdf should hold a PDF without a password")


def test_whatever_the_renderer_raises_is_said_of_its_page(folder, monkeypatch):
    def fail(*_, **__):
        raise IndexError("broken\nstream")

    first, second = find_pages([folder / "doc.pdf"], "1-2")
    monkeypatch.setattr(pypdfium2.PdfPage, "render", fail)
    with pytest.raises(ValueError, match="doc.pdf should hold a PDF.*: broken stream; restore"):
        second.open()
    assert first.size() == (120, 180)


def test_paths_without_pages(folder):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        list(find_pages([folder / "nowhere"]))
    (folder / "notes" / "a.png").unlink()
    with pytest.raises(ValueError, match="notes should hold page images or PDFs"):
        list(find_pages([folder / "notes"]))


def test_texts_are_laid_out_as_the_files_are(folder):
    def texts(*sources):
        root = common_root(sources)
        return sorted(str(text_file(page.name, root)) for page in find_pages(sources, "1"))

    assert texts(folder) == ["doc_page_1.md", "notes/a.md", "page10.md", "page9.md",
                             "scan_page_1.md"]  # fmt: skip
    assert texts(folder / "notes", folder / "doc.pdf") == ["doc_page_1.md", "notes/a.md"]
    # wherever a list leads, texts stay below their folder
    assert text_file("/else/where/a.png", folder) == Path("else/where/a.md")
    assert text_file(f"{folder}/../../a.png", folder).is_absolute() is False


def test_texts_of_data_sets_lie_apart_from_those_of_files_whatever_the_working_folder(
    folder, monkeypatch
):
    for place in (folder, folder / "notes"):
        monkeypatch.chdir(place)
        root = common_root(["hub:some/set", folder / "notes"])
        assert root == folder / "notes"
        assert str(text_file("hub:some/set/00000001", root)) == "hub:some/set/00000001.md"
        assert str(text_file("hub:../a/01", common_root(["hub:../a"]))) == "01.md"


def test_lists_of_paths(folder):
    listed = folder / "some.jsonl"
    listed.write_text('"page9.png"\n{"path": "doc.pdf"}\n\n"gone.png"\n"page9.png"\n')
    pages = list(find_pages([listed], "4-"))
    assert names(pages, folder) == ["page9.png", "doc.pdf, page 4", "doc.pdf, page 5", "gone.png"]
    with pytest.raises(FileNotFoundError, match="gone.png"):
        pages[-1].open()
    listed.write_text('"page9.png"\n{"file": 1}\n')
    with pytest.raises(ValueError, match="some.jsonl, line 2 should hold a path, or an object"):
        list(find_pages([listed]))


def shard(path, files):
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def test_shards_are_read_where_they_are_and_are_damaged_by_themselves(folder):
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    shard(folder / "0.tar", files | {"page9.json": b"{}", "._page9.png": b"", "bad.png": b"?"})
    pages = list(find_pages([folder / "0.tar"], "2"))
    inside = ["bad.png", "doc.pdf, page 2", "page10.png", "page9.png", "scan.tif, page 2"]
    assert sorted(names(pages, folder / "0.tar")) == inside
    for page in pages:
        if "bad" in page.name:
            with pytest.raises(ValueError, match="0.tar/bad.png should hold an image"):
                page.open()
        else:
            again = pickle.loads(pickle.dumps(page))
            assert again.open().size == again.size()
            assert again.open().getpixel((9, 9))[0] == pytest.approx(20, abs=3)
    whole = (folder / "0.tar").read_bytes()
    (folder / "0.tar").write_bytes(whole[:-20_000])
    *first, last = find_pages([folder / "0.tar"])
    assert len(first) > 2 and last.name == str(folder / "0.tar")
    with pytest.raises(ValueError, match="0.tar should hold a tar archive"):
        last.open()
    for name in ("../out.png", "/out.png", "a/../../out.png"):
        shard(folder / "0.tar", {name: files["page9.png"]})
        (page,) = find_pages([folder / "0.tar"])
        with pytest.raises(ValueError, match="out.png leads out of it"):
            page.open()


def test_links_in_shards_are_damaged_pages(folder):
    with tarfile.open(folder / "0.tar", "w") as tar:
        tar.add(folder / "page9.png", "a.png")
        for name, kind in (("b.png", tarfile.LNKTYPE), ("c.pdf", tarfile.SYMTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "a.png"
            tar.addfile(entry)
    whole, *links = find_pages([folder / "0.tar"])
    assert whole.open().size == (60, 90) and len(links) == 2
    for page in links:
        with pytest.raises(
            ValueError, match=r"0.tar/(b.png|c.pdf) should be a file with its bytes"
        ):
            page.open()


def test_a_data_set_may_name_images_within_archives(folder):
    pytest.importorskip("datasets")
    (folder / "set").mkdir()
    with zipfile.ZipFile(folder / "set" / "train.zip", "w") as file:
        file.write(folder / "page9.png", "a.png")
        file.write(folder / "page10.png", "b.png")
        file.writestr("c.png", b"damaged")
    first, second, damaged = find_pages([f"hub:{folder / 'set'}"])
    assert first.open().size == second.size() == (60, 90)
    with pytest.raises(ValueError, match="00000002 should hold an image"):
        damaged.open()
    with pytest.raises(ValueError, match="lost should hold an image"):
        open_image(Row("lost", None, f"zip://d.png::{folder}/set/train.zip"))


def test_a_data_set_is_streamed_without_a_page_being_decoded(folder):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"scan": datasets.Image(), "text": datasets.Value("string")})
    rows = {"scan": [str(folder / "page9.png")] * 3, "text": list("abc")}
    (folder / "set").mkdir()
    datasets.Dataset.from_dict(rows, features).to_parquet(folder / "set" / "train.parquet")
    pages = list(find_pages([f"hub:{folder / 'set'}"]))
    assert [page.name.rpartition("/")[2] for page in pages] == ["00000000", "00000001", "00000002"]
    assert pages[2].open().size == pages[2].size() == (60, 90)
    root = common_root([f"hub:{folder / 'set'}"])
    assert str(text_file(pages[0].name, root)) == "00000000.md"
