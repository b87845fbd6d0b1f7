"""Free memory is what the machine and its containers leave."""

import pytest

from compress.common.memory import memory

MEMINFO = "MemTotal:       1000 kB\nMemFree:          10 kB\nMemAvailable:    800 kB\n"


def system(path, groups):
    """A machine, and by control group its limit, what it uses, and what of that is cached."""
    (path / "proc" / "self").mkdir(parents=True)
    (path / "proc" / "meminfo").write_text(MEMINFO)
    (path / "proc" / "self" / "cgroup").write_text("4:memory:/old\n0::/pod/app\n")
    for name, (limit, used, cached) in groups.items():
        folder = path / "sys" / "fs" / "cgroup" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cached}\n")
    return path


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ({}, (800, 1000)),
        ({"pod/app": ("max", 9, 0)}, (800, 1000)),
        ({"pod/app": (600 * 1024, 500 * 1024, 200 * 1024)}, (300, 600)),
        ({"pod": (700 * 1024, 650 * 1024, 0), "pod/app": (900 * 1024, 0, 0)}, (50, 700)),
        ({"pod/app": (600 * 1024, 700 * 1024, 0)}, (0, 600)),
    ],
)
def test_the_limits_of_containers_count(tmp_path, groups, expected):
    assert memory("cpu", system(tmp_path, groups)) == tuple(1024 * size for size in expected)


def test_here_some_is_free():
    free, total = memory()
    assert 0 < free <= total
