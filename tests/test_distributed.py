"""Two processes do what one does: same masks, kept sets, samples and metrics, to rounding.

The runs are those of tests/programs/processes.py.
"""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin
from diffusers import UNet2DModel
from safetensors.torch import load_file

from builders import models, programs, transformers
from compress.common.journal import fingerprint
from compress.parallel import distributed, sharding
from compress.parallel.launch import _stopped, adopt_slurm, launched, needed, rank, reports_the_end
from programs.processes import STOP


def drive(folder, *arguments):
    stderr = programs.run("processes", *arguments, cwd=folder, timeout=900).stderr
    codes = json.loads((folder / "codes.json").read_text())
    assert codes == {"1": [0], "2": [0, 0]}, stderr
    return folder


@pytest.fixture(scope="module")
def driven(tmp_path_factory):
    return drive(tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def slowly_driven(tmp_path_factory):
    return drive(tmp_path_factory.mktemp("processes"), "slow")


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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["soft", "flow", "one-shot"])
def test_two_processes_keep_what_one_keeps(slowly_driven, name):
    same(slowly_driven, name)


def facts(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_processes_that_cut_the_weights_keep_what_one_keeps(driven):
    same(driven, "soft", "cut x2")
    found, whole = facts(driven, "cut x2"), facts(driven, "soft x2")
    # the whole, six resnets, and the last norm, which accelerate cuts out by itself
    assert found["units"] == 8 and whole["units"] == whole["ema"]["cut"] == 0
    slim = [t for name, t in pair(driven, "soft")[0].items() if name.endswith(("weight", "bias"))]
    assert found["ema"]["cut"] == found["moments"]["cut"] == len(slim)
    # half of everything, but for tensors that two do not divide
    for key in ("ema", "moments"):
        assert found[key]["here"] == pytest.approx(sum(t.numel() for t in slim) / 2, rel=0.02)


def test_equal_micro_batches_give_equal_bits(driven):
    # two processes in one part each, and one process in two: the same convolutions, the same sums
    one, two = pair(driven, "soft")
    assert one.keys() == two.keys() and 0 < one["kept"].mean() < 1
    for key in one:
        assert torch.equal(one[key], two[key]), key
    # to the last bit of float64, in which losses are averaged
    assert losses(driven, "soft x1") == pytest.approx(losses(driven, "soft x2"), rel=1e-14)


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
    assert torch.equal(one["keep_counts"], two["keep_counts"])
    # the scores have moved them
    assert not torch.equal(one["keep_counts"], one["uniform"])


def test_soft_masks_are_really_soft(driven):
    masks = pair(driven, "soft")[0]["trace/masks"]
    assert ((masks > 0.05) & (masks < 0.95)).any()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flow", "one-shot", "gates"])
def test_processes_that_cut_the_weights_do_so_with_every_criterion(slowly_driven, name):
    same(slowly_driven, name, f"cut {name} x2")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["bf16", "cut bf16"])
def test_bf16_trains_on_two_processes(slowly_driven, way):
    # products are rounded to 8 bits, and differently for every size of batch
    found = [losses(slowly_driven, name) for name in ("bf16 x1", f"{way} x2")]
    assert found[0] == pytest.approx(found[1], rel=0.05)
    assert found[0] != found[1] and len(found[0]) == 8


def test_a_run_goes_on_with_another_number_of_processes_and_with_cut_weights(driven):
    # of one process, then of two with cut weights, then of two with whole ones
    same(driven, "soft", "resumed x2")
    # only what was not saved is done again, and the log of what was is kept
    assert losses(driven, "resumed x2")[:STOP] == losses(driven, "soft x1")[:STOP]


def test_only_the_main_process_writes(driven):
    # another writer would have moved the first state aside
    states = [p.name for p in (driven / "left of 2" / "state").iterdir()]
    assert states == ["state.safetensors"]
    rows = [json.loads(r) for r in (driven / "left of 2" / "log.jsonl").read_text().splitlines()]
    steps = [row["step"] for row in rows if row["stage"] == "flow"]
    assert steps == list(range(1, STOP + 1))


def test_samples_and_metrics_are_those_of_one_process(driven):
    one = load_file(driven / "measured x1 0.safetensors")["samples"]
    expected = json.loads((driven / "measured x1 0.json").read_text())
    assert one.shape == (2, 11, 1, 16, 16) and "fid_digits" in expected
    for process in (0, 1):
        two = load_file(driven / f"measured x2 {process}.safetensors")
        assert int(two["per process"]) == process
        assert torch.equal(one, two["samples"])
        assert json.loads((driven / f"measured x2 {process}.json").read_text()) == expected


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
    def check(*blocks, unet=None):
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy=policy, transformer_cls_names_to_wrap=blocks
        )
        state = SimpleNamespace(fsdp_plugin=plugin)
        unet = unet or UNet2DModel(**models.TWO_LEVELS)
        sharding.check_blocks(SimpleNamespace(is_fsdp2=cuts, state=state), unet)

    check("ResnetBlock2D", "AttnDownBlock2D")
    applies = cuts and policy == "transformer_based_wrap"
    dit = transformers.build("dit")
    check("BasicTransformerBlock", "CombinedTimestepLabelEmbeddings", unet=dit)
    alone = pytest.raises(ValueError, match="name CombinedTimestepLabelEmbeddings, too, .*; add it")
    with alone if applies else nullcontext():
        check("BasicTransformerBlock", unet=dit)
    wrong = pytest.raises(ValueError, match=r"ResnetBlock2D, .*; got BasicTransformerBlock; remove")
    with wrong if applies else nullcontext():
        check("ResnetBlock2D", "BasicTransformerBlock")


def test_a_copy_of_moments_lies_in_memory_as_its_parameter_does():
    weight = torch.arange(36.0).reshape(2, 2, 3, 3)
    parameter = torch.nn.Parameter(torch.zeros(2, 2, 3, 3).to(memory_format=torch.channels_last))
    copy = sharding.cut_like(weight.double(), parameter)
    assert copy.stride() == parameter.stride() != weight.stride()
    assert torch.equal(copy, weight.double()) and not copy.requires_grad


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
    assert needed(2) and not needed(1) and not launched() and rank() == 0 and reports_the_end()
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert launched() and reports_the_end() and not needed(2) and not needed(1)
    with pytest.raises(ValueError, match="started 2 processes, but --processes is 4"):
        needed(4)
    monkeypatch.setenv("COMPRESS_LAUNCHED", "1")
    assert not reports_the_end()
    monkeypatch.delenv("COMPRESS_LAUNCHED")
    monkeypatch.setenv("RANK", "1")
    assert rank() == 1 and not reports_the_end()


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
