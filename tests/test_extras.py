"""Optional packages: what is said where one is missing, and what works without them."""

import pytest
from PIL import Image

from builders import programs
from compress import doctor
from compress.common.extras import EXTRAS, MissingExtraError, extra
from compress.reports.html import drawn


def test_a_missing_package_is_one_line_with_the_command():
    with pytest.raises(MissingExtraError) as raised, extra("ocr", "scoring text"):
        import no_such_package.inside  # noqa: F401
    assert str(raised.value) == (
        "scoring text needs the package no_such_package, which is not installed; "
        "run: pip install 'compress-models[ocr]'"
    )
    assert raised.value.name == "no_such_package"


def test_a_missing_module_of_ours_is_no_missing_extra():
    with pytest.raises(ModuleNotFoundError, match="no_such"), extra("ocr", "scoring text"):
        import compress.no_such  # noqa: F401


@pytest.mark.parametrize(
    ("requires", "found", "ok"),
    [
        ("pytest>=1", "installed", True),
        ("no-such-package", "without no-such-package", True),
        ("pytest<1", "installed, not supported: pytest", False),
    ],
)
def test_doctor_shows_the_extras(monkeypatch, requires, found, ok):
    wanted = [f"{requires}; extra == '{name}'" for name in EXTRAS]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: wanted)
    checks = {check.name: check for check in doctor.examine()}
    for name, purpose in EXTRAS.items():
        check = checks[f"extra {name}"]
        assert check.found.startswith(found) and check.found.endswith(f"(for {purpose})")
        assert check.ok is ok and not check.required
        command = f"pip install 'compress-models[{name}]'"
        assert (command in check.hint) is (found != "installed")


def test_a_report_without_matplotlib_says_so():
    def draw():
        with extra("report", "drawing figures"):
            import no_such_package  # noqa: F401

    assert drawn(lambda: []) == []
    [section] = drawn(draw)
    assert section.figures == () and "pip install 'compress-models[report]'" in section.notes[0]


LINES = {
    "run ddpm_oneshot --dry-run": None,
    "read page.png --model builtin:reader-qwen --max-new-tokens 2": None,
    "run ddpm_oneshot --dry-run --set data=hub:name": "data",
    "run reader_fastocr": "ocr",
    "pages folder": "report",
}


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """The folder, and what was printed, without the extras and triton."""
    folder = tmp_path_factory.mktemp("without")
    Image.new("L", (64, 64), 255).save(folder / "page.png")
    return folder, programs.run("without_extras", *LINES, cwd=folder)


def test_what_needs_an_extra_is_refused_before_work_begins_and_all_else_works(without):
    folder, done = without
    codes = [line for line in done.stdout.splitlines() if line.startswith("exit")]
    assert codes == [f"exit {2 if name else 0}" for name in LINES.values()]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error")]
    for line, name in zip(errors, filter(None, LINES.values()), strict=True):
        assert line.endswith(f"which is not installed; run: pip install 'compress-models[{name}]'")
    assert [path.name for path in folder.iterdir()] == ["page.png"]


def test_everything_runs_without_triton(without):
    sparse, focal, error = without[1].stdout.splitlines()[-3:]
    assert (float(sparse), float(focal)) == (32.0, 1.0)
    assert "Triton does not import" in error and "fix that" in error
