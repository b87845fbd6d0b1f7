"""How much memory there is, and how much of it is free."""

from pathlib import Path


def memory(device: str = "cpu", system: Path = Path("/")) -> tuple[int, int]:
    """Bytes that can still be taken on a device, and all that it has.

    Of the machine's memory, what Linux calls available, and no more than the control groups
    (version 2) of this process allow: the limits of a container.

    Parameters
    ----------
    device : "cpu", or a CUDA device.
    system : where ``proc`` and ``sys`` are.
    """
    if device.startswith("cuda"):
        import torch

        return torch.cuda.mem_get_info(device)
    lines = (system / "proc/meminfo").read_text(encoding="ascii").splitlines()
    facts = dict(line.split(":", 1) for line in lines)
    free, total = (1024 * int(facts[name].split()[0]) for name in ("MemAvailable", "MemTotal"))
    groups = (system / "proc/self/cgroup").read_text(encoding="utf8").splitlines()
    root = system / "sys/fs/cgroup"
    for path in (line.removeprefix("0::/") for line in groups if line.startswith("0::/")):
        for folder in ((root / path), *(root / path).parents):
            limit = folder / "memory.max"
            if not limit.is_file() or (text := limit.read_text(encoding="ascii").strip()) == "max":
                continue
            counts = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
            cached = next(int(c.split()[1]) for c in counts if c.startswith("inactive_file "))
            used = int((folder / "memory.current").read_text(encoding="ascii")) - cached
            free, total = min(free, max(0, int(text) - used)), min(total, int(text))
    return free, total


def check_memory(needed: int, device: str, what: str, way: str) -> None:
    """Refuse what takes more memory than is free.

    Parameters
    ----------
    needed : bytes.
    device : whose memory is taken.
    what : takes it.
    way : what to do.

    Raises
    ------
    ValueError : with what is needed, what is free, and what there is.
    """
    free, total = memory(device)
    if needed > free:
        least, left, all_there_is = (f"{size / 2**30:,.1f} GiB" for size in (needed, free, total))
        raise ValueError(
            f"{what}: {least}, and {left} of the {all_there_is} of {device} are free; {way}"
        )
