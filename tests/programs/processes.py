"""What one process and two make of runs, samples and metrics: ``processes.py [slow]``.

One process imports torch and forks a group of one and a group of two, which talk by gloo. On two
processes the weights of some runs are cut (FSDP). Results lie in the current folder.
"""

import json
import os
import shutil
import sys
import warnings
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from builders import pruning
from builders.forks import exit_code, fork, free_port
from builders.models import TWO_LEVELS
from builders.pipelines import build
from compress.common.events import drain
from compress.data.digits import digits
from compress.data.sources import ImageData
from compress.eval import diffusion
from compress.methods.gradflow import GradFlow, OneShot
from compress.methods.training import Training
from compress.parallel import distributed

FLOW, RECOVER, STOP = 4, 2, 2
SOFT = {
    "name": "gradflow",
    "keep_macs": 0.29,
    "steps": FLOW,
    "update_every": 1,
    "criterion_every": 2,
    "criterion_batches": 2,
    "max_move": 0.5,
    "settle": 0.25,
}
SHOT = {"name": "oneshot", "keep_macs": 0.29, "steps": 2, "criterion_batches": 1}
TRAINING = {"steps": RECOVER, "batch": 8, "lr": 1e-3, "save_every": 2}
SOFTLY = {
    "unet": {"mid_block_type": None},
    "method": SOFT,
    "training": TRAINING | {"distill": 0.5, "flip": True},
    "parts": 2,
}
RUNS = {"soft": SOFTLY, "cut": SOFTLY | {"blocks": ["ResnetBlock2D"]}}
SLOW_RUNS = {
    "soft": {
        "unet": {"mid_block_type": None},
        "method": SOFT,
        "training": TRAINING | {"distill_features": 0.5, "flip": True},
    },
    "flow": {
        "method": SOFT | {"criterion": "gradient_flow", "hvp": "exact", "steps": 6},
        "training": TRAINING
        | {"steps": 2, "gradient_accumulation": 2, "gradient_checkpointing": True},
    },
    "one-shot": {"method": SHOT, "training": TRAINING | {"steps": 1, "workers": 1}},
    "bf16": {
        "method": SOFT | {"steps": 6},
        "training": TRAINING | {"steps": 2, "mixed_precision": "bf16"},
    },
    "global": {
        "unet": {"block_out_channels": (16, 32)},
        "method": SOFT
        | {"allocation": "global", "keep_macs": 0.37, "criterion_every": 1}
        | {"steps": 10, "max_move": 0.25},
        "training": TRAINING | {"steps": 1},
    },
}
# gates of blocks and masks of units of a transformer
SLOW_RUNS["gates"] = {
    "method": SOFT | {"granularity": "both", "keep_macs": 0.5, "criterion": "fisher"},
    "training": TRAINING,
}
SLOW_RUNS["cut gates"] = SLOW_RUNS["gates"] | {
    "blocks": ["BasicTransformerBlock", "CombinedTimestepLabelEmbeddings"]
}
SLOW_RUNS |= {
    f"cut {name}": SLOW_RUNS[name] | {"blocks": ["AttnDownBlock2D", "ResnetBlock2D"]}
    for name in ("flow", "one-shot", "bf16")
}
# it changes what torch makes: nothing may follow
SLOW_RUNS["double"] = {
    "method": SOFT | {"steps": 40, "max_move": 0.2, "criterion": "gradient_flow"},
    "training": TRAINING | {"steps": 10, "distill_features": 0.5},
    "double": True,
}

FLOAT = torch.Tensor.float


def unet(**changes) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(**(TWO_LEVELS | {"sample_size": 16} | changes))


def cut_weights(blocks, precision):
    # accelerate cuts weights on GPUs only; the same code of its runs on a CPU when told so
    state = Accelerator(cpu=True, mixed_precision=precision).state
    PartialState().distributed_type = state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=blocks,
        # as accelerate's launcher sets them
        cpu_ram_efficient_loading=True,
        mixed_precision_policy="bf16",
    )


def numbers(tensors):
    cut = [t for t in tensors if isinstance(t, DTensor)]
    return {"cut": len(cut), "here": sum(t.to_local().numel() for t in cut)}


def prune(runs, name, folder=None, resume=False, copy=None):
    """Run to the end; the folder as it is STOP steps later may be copied."""
    scenario = runs[name]
    AcceleratorState._reset_state(False)
    training = dict(scenario["training"])
    if distributed.processes() > 1:
        PartialState().distributed_type = DistributedType.MULTI_CPU
    if "blocks" in scenario:
        cut_weights(scenario["blocks"], training.get("mixed_precision", "no"))
    if "parts" in scenario:
        # micro-batches of the same size on any number of processes
        training["gradient_accumulation"] = scenario["parts"] // distributed.processes()
    double = "double" in scenario
    torch.set_default_dtype(torch.float64 if double else torch.float32)
    # what training raises to float32 shall not be lowered to it
    torch.Tensor.float = torch.Tensor.double if double else FLOAT
    kind = {"gradflow": GradFlow, "oneshot": OneShot}[scenario["method"]["name"]]
    model, data = unet(**scenario.get("unet", {})), pruning.noise(16, 30, 10)
    if "gates" in name:
        labels = [k % 10 for k in range(40)]
        model = build("dit", None)
        data = ImageData(data.name, data.train, data.held_out, labels[:30], labels[30:])
    run = pruning.start(
        kind(**scenario["method"]),
        Training(**training),
        model,
        data=data,
        folder=folder,
        resume=resume,
    )
    events = run.events()
    if copy:
        list(islice(events, STOP))
        if distributed.is_main():
            shutil.copytree(folder, copy)
    return run, drain(events)


def keep(name, run, pruned):
    if not distributed.is_main():
        return
    tensors = dict(pruned.model.state_dict()) | {f"trace/{k}": t for k, t in pruned.trace.items()}
    tensors |= {"kept": run.kept, "keep_counts": run.layout.keep_counts}
    # cloned, since it is the same tensor where widths are not free
    tensors["uniform"] = run.mask_scheduler._layout.keep_counts.clone()
    save_file(tensors, Path(f"{name}.safetensors"))
    units = sum(isinstance(module, FSDPModule) for module in run.model.modules())
    facts = {"units": units, "log": run.journal.rows}
    facts["ema"] = numbers(run.ema.values())
    facts["moments"] = numbers(state["exp_avg"] for state in run.optimizer.state.values())
    (Path(f"{name}.json")).write_text(json.dumps(facts))


def measure(name):
    pipeline = DDPMPipeline(unet=unet().eval(), scheduler=DDPMScheduler(num_train_timesteps=50))
    settings = diffusion.SamplingSettings(samples=11, steps=2, sampling_seeds=2, batch=4)
    reference = diffusion.reference_images(digits("b")[0], 32)
    found = diffusion.evaluate(pipeline, reference=reference, settings=settings)
    samples = diffusion.gather(diffusion.draw_batches(pipeline, settings), settings)
    kept = {"samples": samples, "per process": torch.tensor(distributed.process())}
    save_file(kept, Path(f"{name} {distributed.process()}.safetensors"))
    values = {key: value.value for key, value in found.items()}
    (Path(f"{name} {distributed.process()}.json")).write_text(json.dumps(values))


def differ():
    # the second process sees another mask than the first
    try:
        distributed.check_same("the mask", {"mask": torch.ones(3) + distributed.process()}, 7)
    except OSError as error:
        return str(error)


def others():
    # a dead partner is named, where torch speaks of a socket
    try:
        with distributed.explained():
            raise RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer")
    except Exception as error:
        return type(error).__name__


def work(runs, count):
    distributed.join("cpu")
    if runs is RUNS:
        alone_and_together(count)
        return
    for name, scenario in runs.items():
        if count > 1 or "blocks" not in scenario:
            keep(f"{name} x{count}", *prune(runs, name))


def alone_and_together(count):
    whole = Path(f"whole of {count}")
    whole.mkdir(exist_ok=True)
    keep(f"soft x{count}", *prune(RUNS, "soft", whole, copy=Path(f"left of {count}")))
    if count > 1:
        # what one process left goes on with cut weights, and what these left with whole ones
        left = Path("left of 1"), Path("left of cut ones")
        keep("cut x2", *prune(RUNS, "cut", left[0], resume=True, copy=left[1]))
        keep("resumed x2", *prune(RUNS, "soft", left[1], resume=True))
    measure(f"measured x{count}")
    texts = {"differ": differ(), "gone": others()}
    Path(f"texts x{count} {distributed.process()}.json").write_text(json.dumps(texts))


def join(runs, count, rank, port):
    """One process of a group."""
    place = {"WORLD_SIZE": count, "RANK": rank, "LOCAL_RANK": rank} if count > 1 else {}
    place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    work(runs, count)


def main(runs: dict) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    codes = {}
    for count in (1, 2):
        port = free_port()
        group = [fork(join, runs, count, rank, port) for rank in range(count)]
        codes[count] = [exit_code(child) for child in group]
    (Path("codes.json")).write_text(json.dumps(codes))


if __name__ == "__main__":
    main(SLOW_RUNS if sys.argv[1:] else RUNS)
