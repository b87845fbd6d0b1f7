"""A process that has imported what programs need, and forks a child for each.

Jobs are lines of JSON on the standard input; the answer to each is the child's exit code. This
package is not imported here: a program may be one that does without it.
"""

import json
import os
import runpy
import signal
import sys

import torch

from builders.forks import exit_code, fork, unshare_mounts

if os.environ["TRITON_INTERPRET"] != "1":  # whose programs run kernels, and seldom models
    import accelerate  # noqa: F401
    from diffusers import DDPMPipeline, StableDiffusionPipeline  # noqa: F401
    from transformers import CLIPTextModel  # noqa: F401


def work(job: dict) -> None:
    for stream, file in enumerate((os.devnull, job["stdout"], job["stderr"])):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), stream)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["environment"])
    signal.alarm(job["timeout"])
    if job["mounts"]:  # before an import starts a thread, which forbids it
        unshare_mounts()
    sys.argv = job["command"]
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(exit_code(fork(work, json.loads(line))), flush=True)
