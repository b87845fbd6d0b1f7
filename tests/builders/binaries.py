"""What a kernel that was compiled without a GPU needs of one."""

import re
import subprocess
import tempfile
from pathlib import Path

from triton.backends import nvidia

CUOBJDUMP = Path(nvidia.__path__[0]) / "bin" / "cuobjdump"


def usage(binary):
    """Bytes of the binary and of shared memory, registers of a thread, bytes that it spills."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return len(binary.asm["cubin"]), binary.metadata.shared, int(registers), int(stack)


def resident(binary):
    """How many programs a multiprocessor of an H100 holds at a time, by registers and memory."""
    _, shared, registers, _ = usage(binary)
    warps = binary.metadata.num_warps
    of_warp = -(-registers * 32 // 256) * 256  # given out in units of 256
    return min(2**16 // (of_warp * warps), 228 * 1024 // (shared + 1024), 64 // warps)
