"""Two processes do what one does: same masks, kept sets, samples and metrics, to rounding.

A driver imports torch once and forks one group of one process and one of two, which talk by gloo.
"""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from diffusers import UNet2DModel
from safetensors.torch import load_file

from builders import models
from compress.common.journal import fingerprint
from compress.parallel import distributed, sharding
from compress.parallel.launch import _stopped, adopt_slurm, launched, rank, speaks, wanted

FLOW, RECOVER, STOP = 6, 2, 3

DRIVER = """
import json
import os
import shutil
import socket
import sys
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from compress.parallel import distributed
from compress.data.digits import digits
from compress.data.sources import ImageData
from compress.data.sources import TensorImages
from compress.eval import diffusion
from compress.methods.gradflow import GradFlow, OneShot
from compress.methods.training import Training
from compress.methods.gradflow.train import PruningRun
from compress.common.journal import Journal

warnings.simplefilter("error")
torch.set_num_threads(1)
job = json.loads(Path(sys.argv[1]).read_text())
root = Path(job["folder"])
MESSAGES = {}
FLOAT = torch.Tensor.float


def unet(**changes):
    torch.manual_seed(0)
    return UNet2DModel(**(job["unet"] | changes))


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


def prune(name, folder=None, stop=None, resume=False):
    scenario = job["runs"][name]
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
    images = torch.rand(40, 1, 16, 16, generator=torch.Generator().manual_seed(5)) * 2 - 1
    kind = {"gradflow": GradFlow, "oneshot": OneShot}[scenario["method"]["name"]]
    run = PruningRun(
        unet(**scenario.get("unet", {})),
        DDPMScheduler(num_train_timesteps=50),
        ImageData("noise", TensorImages(images[:30]), TensorImages(images[30:])),
        kind(**scenario["method"]),
        Training(**training),
        Journal(folder),
        device="cpu",
        resume=resume,
    )
    events, pruned = run.events(), None
    for _ in range(stop or 10**6):
        try:
            next(events)
        except StopIteration as end:
            pruned = end.value
            break
    events.close()
    return run, pruned


def keep(name, run, pruned):
    if not distributed.is_main():
        return
    tensors = dict(pruned.unet.state_dict()) | {f"trace/{k}": t for k, t in pruned.trace.items()}
    tensors |= {"kept": run.kept, "quota": run.layout.quota}
    # cloned, since it is the same tensor where widths are not free
    tensors["uniform"] = run.mover._layout.quota.clone()
    save_file(tensors, root / f"{name}.safetensors")
    units = sum(isinstance(module, FSDPModule) for module in run.model.modules())
    facts = {"units": units, "log": run.journal.rows}
    facts["ema"] = numbers(run.ema.values())
    facts["moments"] = numbers(state["exp_avg"] for state in run.optimizer.state.values())
    (root / f"{name}.json").write_text(json.dumps(facts))


def measure(name):
    pipeline = DDPMPipeline(unet=unet().eval(), scheduler=DDPMScheduler(num_train_timesteps=50))
    settings = diffusion.SamplingSettings(samples=37, steps=2, sampling_seeds=2, batch=16)
    reference = diffusion.reference_images(digits("b")[0], 100)
    found = diffusion.evaluate(pipeline, reference=reference, settings=settings)
    samples = diffusion.draw(pipeline, settings)
    kept = {"samples": samples.images, "per process": torch.tensor(distributed.process())}
    save_file(kept, root / f"{name} {distributed.process()}.safetensors")
    values = {key: value.value for key, value in found.items()}
    (root / f"{name} {distributed.process()}.json").write_text(json.dumps(values))


def differ():
    # the second process sees another mask than the first
    try:
        distributed.check_same("the mask", {"mask": torch.ones(3) + distributed.process()}, 7)
    except OSError as error:
        return str(error)


def others(count):
    # a dead partner is named, where torch speaks of a socket
    try:
        with distributed.explained():
            raise RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer")
    except Exception as error:
        return type(error).__name__


def work(count):
    distributed.join("cpu")
    for name, scenario in job["runs"].items():
        if count > 1 or "blocks" not in scenario:
            keep(f"{name} x{count}", *prune(name))
    if "soft" not in job["runs"]:
        return
    state = root / f"state of {count}"
    state.mkdir(exist_ok=True)
    prune("soft", state, stop=job["stop"])
    elsewhere = root / f"state of {3 - count}"
    if elsewhere.exists():
        if distributed.is_main():
            shutil.copytree(elsewhere, root / "state of cut")
        prune("cut", root / "state of cut", stop=1, resume=True)
        keep("resumed cut", *prune("cut", root / "state of cut", resume=True))
        keep(f"resumed x{count}", *prune("soft", elsewhere, resume=True))
    measure(f"measured x{count}")
    texts = {"differ": differ(), "gone": others(count)}
    (root / f"texts x{count} {distributed.process()}.json").write_text(json.dumps(texts))


def group(count):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if not child:
            os.environ |= {
                "WORLD_SIZE": str(count),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
            if count == 1:
                for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
                    del os.environ[name]
            code = 1
            try:
                work(count)
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


codes = {count: group(count) for count in (1, 2)}
(root / "codes.json").write_text(json.dumps(codes))
"""

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
TRAINING = {"steps": RECOVER, "batch": 8, "lr": 1e-3, "save_every": 1}
SOFTLY = {"method": SOFT, "training": TRAINING | {"distill_features": 0.5, "flip": True}}
RUNS = {
    "soft": SOFTLY,
    "alike": {"method": SOFT, "training": TRAINING | {"distill": 0.5}, "parts": 2},
    "cut": SOFTLY | {"blocks": ["ResnetBlock2D"]},
}
SLOW_RUNS = {
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


def drive(folder, unet, runs):
    (folder / "driver.py").write_text(DRIVER)
    job = {"folder": str(folder), "unet": unet, "runs": runs, "stop": STOP}
    (folder / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, "-P", str(folder / "driver.py"), str(folder / "job.json")],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    codes = json.loads((folder / "codes.json").read_text())
    assert codes == {"1": [0], "2": [0, 0]}, done.stderr
    return folder


@pytest.fixture(scope="module")
def driven(tmp_path_factory):
    unet = models.TWO_LEVELS | {"sample_size": 16}
    return drive(tmp_path_factory.mktemp("processes"), unet, RUNS)


@pytest.fixture(scope="module")
def slowly_driven(tmp_path_factory):
    unet = models.TWO_LEVELS | {"sample_size": 16}
    return drive(tmp_path_factory.mktemp("processes"), unet, SLOW_RUNS)


def pair(folder, name, other=None):
    names = (f"{name} x1", other or f"{name} x2")
    return [load_file(folder / f"{n}.safetensors") for n in names]


def losses(folder, name):
    rows = json.loads((folder / f"{name}.json").read_text())["log"]
    return [row["loss"] for row in rows if row["stage"] in ("flow", "recover")]


def same(folder, name, other=None):
    other = other or f"{name} x2"
    one, two = pair(folder, name, other)
    assert torch.equal(one["kept"], two["kept"]) and 0 < one["kept"].mean() < 1
    assert (one["trace/masks"] - two["trace/masks"]).abs().max() <= 1e-5
    assert torch.equal(one["trace/masks"][-1], two["trace/masks"][-1])
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-4)
    found = [losses(folder, run) for run in (f"{name} x1", other)]
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_two_processes_keep_what_one_keeps(driven):
    same(driven, "soft")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flow", "one-shot"])
def test_so_they_do_with_every_criterion_and_way_to_train(slowly_driven, name):
    same(slowly_driven, name)


def facts(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_processes_that_cut_the_weights_keep_what_one_keeps(driven):
    same(driven, "soft", "cut x2")
    found, whole = facts(driven, "cut x2"), facts(driven, "soft x2")
    # the whole, eight resnets, and the last norm, which accelerate cuts out by itself
    assert found["units"] == 10 and whole["units"] == whole["ema"]["cut"] == 0
    slim = [t for name, t in pair(driven, "soft")[0].items() if name.endswith(("weight", "bias"))]
    assert found["ema"]["cut"] == found["moments"]["cut"] == len(slim)
    # half of everything, but for tensors that two do not divide
    for key in ("ema", "moments"):
        assert found[key]["here"] == pytest.approx(sum(t.numel() for t in slim) / 2, rel=0.02)


def test_a_whole_run_goes_on_with_cut_weights_and_again(driven):
    same(driven, "soft", "resumed cut")


def test_equal_micro_batches_give_equal_bits(driven):
    # two processes in one part each, and one process in two: the same convolutions, the same sums
    one, two = pair(driven, "alike")
    assert one.keys() == two.keys() and 0 < one["kept"].mean() < 1
    for key in one:
        assert torch.equal(one[key], two[key]), key
    # to the last bit of float64, in which losses are averaged
    assert losses(driven, "alike x1") == pytest.approx(losses(driven, "alike x2"), rel=1e-14)


@pytest.mark.slow
def test_in_float64_there_is_no_difference_but_rounding(slowly_driven):
    # in float32 training amplifies rounding by the step: that is no fault of the processes
    one, two = pair(slowly_driven, "double")
    assert one["trace/masks"].dtype == torch.float64 and len(one["trace/masks"]) > 20
    assert torch.equal(one["kept"], two["kept"])
    assert (one["trace/masks"] - two["trace/masks"]).abs().max() <= 1e-11
    found = [losses(slowly_driven, f"double x{n}") for n in (1, 2)]
    assert found[0] == pytest.approx(found[1], rel=1e-11)


@pytest.mark.slow
def test_two_processes_choose_the_widths_that_one_chooses(slowly_driven):
    same(slowly_driven, "global")
    one, two = pair(slowly_driven, "global")
    assert torch.equal(one["quota"], two["quota"])
    # the scores have moved them
    assert not torch.equal(one["quota"], one["uniform"])


def test_soft_masks_are_really_soft(driven):
    masks = pair(driven, "soft")[0]["trace/masks"]
    assert ((masks > 0.05) & (masks < 0.95)).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flow", "one-shot"])
def test_so_do_cut_weights(slowly_driven, name):
    same(slowly_driven, name, f"cut {name} x2")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["bf16", "cut bf16"])
def test_bf16_trains_on_two_processes(slowly_driven, way):
    # products are rounded to 8 bits, and differently for every size of batch
    found = [losses(slowly_driven, name) for name in ("bf16 x1", f"{way} x2")]
    assert found[0] == pytest.approx(found[1], rel=0.05)
    assert found[0] != found[1] and len(found[0]) == 8


def test_a_run_goes_on_with_another_number_of_processes(driven):
    one, resumed = pair(driven, "soft", "resumed x2")
    assert torch.equal(one["kept"], resumed["kept"])
    for key in one:
        torch.testing.assert_close(one[key], resumed[key], rtol=0, atol=1e-4)
    # only what was not saved is done again, and the log of what was is kept
    assert losses(driven, "resumed x2")[:STOP] == losses(driven, "soft x1")[:STOP]


def test_only_the_main_process_writes(driven):
    states = sorted(p.name for p in (driven / "state of 2" / "state").iterdir())
    assert states == ["state-1.safetensors", "state.safetensors"]
    rows = [json.loads(r) for r in (driven / "state of 2" / "log.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["stage"] == "flow"]
    assert steps == list(range(1, STOP + 1))


def test_samples_and_metrics_are_those_of_one_process(driven):
    one = load_file(driven / "measured x1 0.safetensors")["samples"]
    wanted = json.loads((driven / "measured x1 0.json").read_text())
    assert one.shape == (2, 37, 1, 16, 16) and "fid_digits" in wanted
    for process in (0, 1):
        two = load_file(driven / f"measured x2 {process}.safetensors")
        assert int(two["per process"]) == process
        assert torch.equal(one, two["samples"])
        assert json.loads((driven / f"measured x2 {process}.json").read_text()) == wanted


def test_a_process_that_differs_is_named_on_all(driven):
    texts = [json.loads((driven / f"texts x2 {k}.json").read_text()) for k in (0, 1)]
    assert texts[0] == texts[1]
    assert "the mask should be the same on all 2 processes; process 1 differs" in texts[0]["differ"]
    assert texts[0]["gone"] == "ConnectionError"
    alone = json.loads((driven / "texts x1 0.json").read_text())
    assert alone == {"differ": None, "gone": "RuntimeError"}


# ---- in this process ------------------------------------------------------------------------


def test_alone_everything_is_the_identity():
    tensors = {"a": torch.arange(3.0)}
    assert distributed.mean(tensors)["a"] is tensors["a"]
    assert distributed.mean_value(0.1) == 0.1
    assert list(distributed.shared_out([3, 4], lambda x: x * x)) == [9, 16]
    assert distributed.from_main(lambda: 5) == 5
    assert distributed.processes() == 1 and distributed.is_main()
    assert distributed.join("cpu") == "cpu" and distributed.join("cuda:1") == "cuda:1"


def test_a_fingerprint_sees_names_types_shapes_and_bits():
    base = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor(3, dtype=torch.bfloat16)}
    others = [
        {"a": base["a"], "c": base["b"]},
        {"a": base["a"].double(), "b": base["b"]},
        {"a": base["a"][:, None], "b": base["b"]},
        {"a": base["a"].nextafter(torch.tensor(9.0)), "b": base["b"]},
        {"a": base["a"].flip(0), "b": base["b"]},
    ]
    prints = [fingerprint(t) for t in (base, *others)]
    assert len(set(prints)) == len(prints)
    assert fingerprint(dict(reversed(base.items()))) == prints[0]


def test_numbered_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="cpu or cuda; got --device cuda:1"):
        distributed.join("cuda:1")


@pytest.mark.parametrize(
    ("device", "asked", "message"),
    [
        ("cuda", {}, "expected fsdp_version: 2 in accelerate's configuration; got 1"),
        ("cpu", {"FSDP_VERSION": "2"}, "on GPUs only; got --device cpu"),
        ("cuda", {"FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "without the m"),
        ("cuda", {"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
    ],
)
def test_ways_to_cut_weights_that_pruning_cannot_follow_are_refused(
    monkeypatch, device, asked, message
):
    for name, value in asked.items() | {("ACCELERATE_USE_FSDP", "true"), ("WORLD_SIZE", "2")}:
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        distributed.join(device)


def test_weights_cut_on_gpus_without_more_are_welcome():
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    assert sharding.check(plugin, "cuda:1") is None


@pytest.mark.parametrize("policy", ["transformer_based_wrap", "no_wrap"])
@pytest.mark.parametrize("cuts", [True, False])
def test_blocks_that_a_unet_lacks_are_refused_before_the_flow(policy, cuts):
    unet = UNet2DModel(**models.TWO_LEVELS)

    def check(*blocks):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy=policy, transformer_cls_names_to_wrap=blocks
        )
        state = SimpleNamespace(fsdp_plugin=plugin)
        sharding.check_blocks(SimpleNamespace(is_fsdp2=cuts, state=state), unet)

    check("ResnetBlock2D", "AttnDownBlock2D")
    wrong = pytest.raises(ValueError, match=r"ResnetBlock2D, .*; got BasicTransformerBlock; remove")
    with wrong if cuts and policy == "transformer_based_wrap" else nullcontext():
        check("ResnetBlock2D", "BasicTransformerBlock")


SLURM = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "70001",
    "SLURM_STEP_ID": "2",
}


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("gpu-a[07-09,12],gpu-b1", "gpu-a07"),
        ("gpu-a[7]", "gpu-a7"),
        ("n1,n2", "n1"),
        ("login", "login"),
    ],
)
def test_a_task_of_srun_finds_its_partners(nodes, host):
    assert adopt_slurm(SLURM | {"SLURM_STEP_NODELIST": nodes}) == {
        "WORLD_SIZE": "4",
        "RANK": "3",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": host,
        "MASTER_PORT": "30003",
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_BYPASS_DEVICE_MAP": "true",
    }


def test_slurm_is_left_alone_where_there_is_nothing_to_share():
    assert adopt_slurm({}) == {}
    assert adopt_slurm(SLURM | {"SLURM_STEP_NUM_TASKS": "1"}) == {}
    # inside a batch script, outside of srun
    assert adopt_slurm({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == {}
    # torchrun inside of a step
    assert adopt_slurm(SLURM | {"WORLD_SIZE": "2"}) == {}
    given = SLURM | {"MASTER_ADDR": "here", "MASTER_PORT": "1", "SLURM_STEP_NODELIST": "n[1-4]"}
    assert (adopt_slurm(given)["MASTER_ADDR"], adopt_slurm(given)["MASTER_PORT"]) == ("here", "1")


def test_a_task_of_srun_uses_the_cores_that_it_was_given():
    assert adopt_slurm(SLURM | {"SLURM_CPUS_PER_TASK": "6"})["OMP_NUM_THREADS"] == "6"
    given = SLURM | {"SLURM_CPUS_PER_TASK": "6", "OMP_NUM_THREADS": "3"}
    assert adopt_slurm(given)["OMP_NUM_THREADS"] == "3"


def test_who_starts_and_who_speaks(monkeypatch):
    assert wanted(2) and not wanted(1) and not launched() and rank() == 0 and speaks()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert launched() and speaks() and not wanted(2) and not wanted(1)
    with pytest.raises(ValueError, match="started 2 processes, but --processes is 4"):
        wanted(4)
    monkeypatch.setenv("COMPRESS_LAUNCHED", "1")
    assert not speaks()
    monkeypatch.delenv("COMPRESS_LAUNCHED")
    monkeypatch.setenv("RANK", "1")
    assert rank() == 1 and not speaks()


@pytest.mark.parametrize(
    ("codes", "text", "code"),
    [
        ({0: 1, 1: -9}, "process 1 of 2 was killed by SIGKILL (perhaps for lack of memory)", 1),
        ({0: -15, 1: 2}, "process 1 of 2 failed", 2),
        ({0: 143, 1: 1}, "process 1 of 2 failed", 1),
        ({0: 2, 1: 2}, "process 0 of 2 failed", 2),
        ({1: -11}, "process 1 of 2 was killed by SIGSEGV; all", 1),
        ({0: -15, 1: -15}, "process 0 of 2 was killed by SIGTERM", 1),
    ],
)
def test_the_cause_is_told_from_what_followed(codes, text, code):
    stopped = _stopped(codes, 2)
    assert text in str(stopped) and stopped.code == code
