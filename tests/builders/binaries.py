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
