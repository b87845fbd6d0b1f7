"""One process of a run of a pipeline with captions: ``family.py NAME METHOD`` (its knobs as JSON).

Pictures, and what the main process leaves, lie in the current folder.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from builders import pipelines
from compress.common.events import drain
from compress.common.journal import Journal
from compress.data.sources import load_images
from compress.methods.base import PruneJob
from compress.methods.gradflow import GradFlow
from compress.methods.gradflow.train import PruningRun
from compress.methods.training import Training
from compress.parallel import distributed


def main(name: str, method: dict) -> None:
    torch.set_num_threads(1)
    device = distributed.join("cpu")
    pipeline = pipelines.build(name, Path(f"words of {distributed.process()}"))
    data = load_images("folder:pictures", 16, 3, "caption")
    training = Training(steps=2, batch=4, condition_dropout=0.5)
    job = PruneJob(pipeline, data, training, device, Journal())
    run = PruningRun(GradFlow(keep_macs=pipelines.KEEP[name], **method), job)
    pruned = drain(run.events())
    if distributed.is_main():
        losses = torch.tensor([row["loss"] for row in run.journal.rows if "loss" in row])
        kept = {"losses": losses, "kept": run.kept, **pruned.trace}
        save_file(kept, f"{distributed.processes()}.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
