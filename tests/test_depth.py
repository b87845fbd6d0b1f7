"""Transformer blocks that go whole: gates, surgery, rivals, and a run from end to end."""

import copy
import itertools
import json
import resource
import time
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    DiTPipeline,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)

import compress
from builders import pipelines, transformers
from builders.events import leave
from builders.tiers import few
from compress.common import cost
from compress.common.cost import unet_cost
from compress.common.events import drain
from compress.common.journal import Journal
from compress.data.sources import load_images
from compress.eval.sampling import sample
from compress.methods.base import PruneJob
from compress.methods.gradflow import GradFlow, OneShot, depth, flow, surgery
from compress.methods.gradflow.forecast import forecast
from compress.methods.gradflow.masks import SoftUNet
from compress.methods.gradflow.train import PruningRun
from compress.methods.training import Training
from compress.models.objective import drop_jointly, inputs_of, predicted
from compress.models.pipelines import check_pipeline

pytestmark = pytest.mark.usefixtures("quick_runs")

KEEP, WITHIN = 0.75, 0.01
FLOW = {
    "steps": 4,
    "max_move": 0.8,
    "update_every": 1,
    "criterion_every": 2,
    "criterion_batches": 1,
}


@pytest.fixture(scope="module")
def digits():
    return load_images("builtin:digits", (16, 16), 1, "label")


@pytest.fixture(scope="module")
def start(family, digits):
    def begin(method=None, folder=None, *, resume=False, **training):
        method = method or GradFlow(keep_macs=KEEP, granularity="block", **FLOW)
        settings = Training(**{"steps": 2, "batch": 4, "save_every": 1} | training)
        job = PruneJob(family("dit"), digits, settings, "cpu", Journal(folder), resume)
        return PruningRun(method, job)

    return begin


@pytest.fixture(scope="module")
def layout(family):
    model = family("dit").transformer
    return depth.depth_layout(model, depth.depth_groups(model), KEEP, WITHIN)


def call(model, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.randn(3, 1, 16, 16, generator=generator)
    named = {"class_labels": torch.tensor([0, 9, 1000])}
    times = torch.tensor([0, 20, 49])
    with torch.no_grad():
        if isinstance(model, SoftUNet):
            return model(noisy, times, condition=named)
        return predicted(model, noisy, times, named)


def without(model, gone):
    """An independent surgery: the blocks are taken out of the dense model."""
    model = copy.deepcopy(model)
    model.transformer_blocks = torch.nn.ModuleList(
        block for i, block in enumerate(model.transformer_blocks) if i not in gone
    )
    return model


# ---- gates and surgery ---------------------------------------------------------------------


@pytest.mark.parametrize("gone", [(2,), (1, 4), (1, 2, 3, 4)])
def test_a_closed_gate_is_the_model_without_the_block(family, layout, gone):
    dense = family("dit").transformer
    soft = SoftUNet(dense, layout).eval()
    assert torch.allclose(call(soft), call(dense), atol=1e-6)
    for position in gone:
        soft.mask[layout.gates[f"transformer_blocks.{position}"]] = 0
    assert torch.allclose(call(soft), call(without(dense, gone)), atol=1e-6)
    assert not torch.allclose(call(soft), call(dense), atol=1e-3)


def test_surgery_leaves_a_plain_model_of_the_kept_blocks(family, layout):
    dense = family("dit").transformer
    mask = torch.ones(layout.units)
    mask[layout.gates["transformer_blocks.1"]] = 0
    gone = len(mask) - int(layout.keep_counts[0])
    for position in range(2, gone + 1):
        mask[layout.gates[f"transformer_blocks.{position}"]] = 0
    slim = surgery.perform(dense, layout, mask).eval()
    assert type(slim) is type(dense) and slim.config.num_layers == 5 - gone
    assert torch.equal(call(slim), call(without(dense, range(1, gone + 1))))


def test_as_many_blocks_stay_as_the_macs_allow(family, layout):
    dense = family("dit").transformer
    gone = len(dense.transformer_blocks) - 1 - layout.widths[0]
    macs = [unet_cost(without(dense, range(1, 1 + n))).macs for n in (gone, gone - 1)]
    assert macs[0] <= KEEP * unet_cost(dense).macs < macs[1]


def test_the_first_block_always_stays(family, layout):
    # the output layer reads its embedding
    assert [*layout.gates] == [f"transformer_blocks.{i}" for i in range(1, 5)]
    dense = family("dit").transformer
    with pytest.raises(ValueError, match="keep_macs must be at least"):
        depth.depth_layout(dense, depth.depth_groups(dense), 0.01, WITHIN)
    single = pipelines.class_transformer(num_layers=1).transformer
    with pytest.raises(ValueError, match="has none beside those that always stay"):
        depth.depth_layout(single, depth.depth_groups(single), KEEP, WITHIN)


# ---- from end to end -----------------------------------------------------------------------


@pytest.mark.slow  # test_units.py saves one without blocks and units
def test_the_flow_ends_in_a_folder_that_plain_diffusers_loads(family, digits, tmp_path):
    method = GradFlow(keep_macs=KEEP, granularity="block", **FLOW)
    training = Training(steps=2, batch=4)
    compressed = compress.apply(family("dit"), method, data=digits, training=training)
    slim = compressed.model.transformer
    kept = compressed.report["kept_blocks"]["transformer_blocks"]
    assert slim.config.num_layers == len(slim.transformer_blocks) == len(kept)
    assert kept[0] == 0 and compressed.report["surgery"]["max_difference"] <= 1e-5
    folder = compressed.save(tmp_path / "slim")
    index = json.loads((folder / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "DiTTransformer2DModel"]
    assert not [*folder.rglob("*.py")]
    drawn = [
        sample(p, count=2, steps=2, sampler="ddim", seed=0, conditions=[3, 7])
        for p in (compressed.model, DiTPipeline.from_pretrained(folder), compress.load(folder))
    ]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


@pytest.fixture(scope="module")
def expected(start):
    return drain(start().events())


# in the flow and in the recovery, as test_units.py does by default
@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 5])
def test_a_resumed_run_ends_with_the_same_weights(start, expected, tmp_path, step):
    leave(start(folder=tmp_path).events(), step)
    resumed = start(folder=tmp_path, resume=True)
    assert resumed.step == step
    found = drain(resumed.events())
    assert found.report["kept_blocks"] == expected.report["kept_blocks"]
    for key, value in expected.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[key], value), key


# ---- rivals --------------------------------------------------------------------------------


def test_uniform_depth_keeps_evenly_spaced_blocks(start):
    run = start(OneShot(keep_macs=KEEP, granularity="block", criterion="uniform_depth", steps=0))
    kept = run.layout.widths[0] + 1
    run.mask_scheduler.estimate(run._plain())
    run.mask_scheduler.binarise(run._plain(), 0)
    expected = torch.linspace(0, 4, kept).round().long().tolist()
    mask = run._plain().mask
    assert depth.kept_blocks(run.dense, run.layout, mask) == {"transformer_blocks": expected}


def test_block_influence_is_how_far_a_block_turns_the_stream(start):
    method = OneShot(keep_macs=KEEP, granularity="block", criterion="block_influence")
    run = start(method)
    soft = run._plain()
    with torch.no_grad():
        for branch in ("attn1.to_out.0", "ff.net.2"):
            projection = soft.unet.get_submodule(f"transformer_blocks.3.{branch}")
            projection.weight.zero_()
            projection.bias.zero_()
    run.mask_scheduler.estimate(soft)
    scores = run.mask_scheduler.state.scores
    still = run.layout.gates["transformer_blocks.3"]
    assert scores[still] == pytest.approx(0, abs=1e-5) and scores.argmin() == still
    assert (scores > 1e-3).sum() == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"granularity": "fine"}, "granularity block or unit or both; got granularity 'fine'"),
        ({"granularity": "block", "allocation": "global"}, "granularity 'block' removes layers"),
    ],
)
def test_a_transformer_loses_blocks_alone(start, changes, message):
    with pytest.raises(ValueError, match=message):
        start(GradFlow(keep_macs=KEEP, **FLOW | changes))


def test_what_does_not_fit_depth_is_refused(family, start):
    unet = family("ddpm").unet
    with pytest.raises(ValueError, match="with granularity fine or coarse; got granularity 'bl"):
        depth.check_granularity(unet, "block", "uniform")
    with pytest.raises(ValueError, match="scores whole blocks; got granularity 'fine'"):
        OneShot(criterion="uniform_depth")
    with pytest.raises(ValueError, match="set it to 0"):
        start(distill_features=0.1)


# ---- what a DiTPipeline is trained on ------------------------------------------------------


def test_a_dropped_label_is_dropped_in_all_blocks(family, digits):
    pipeline = family("dit")
    labels = inputs_of(pipeline).condition([3, 4], [False, True], torch.device("cpu"))
    assert labels["class_labels"].tolist() == [3, 1000]
    model = copy.deepcopy(pipeline.transformer).train()
    drop_jointly(model)
    assert torch.equal(call(model), call(model))  # without it each block draws anew


def test_a_learned_variance_is_left_alone(family):
    pipeline = pipelines.class_transformer(out_channels=2)
    check_pipeline(pipeline)
    pipeline.transformer.eval()
    noisy = torch.zeros(1, 1, 16, 16)
    named = {"class_labels": torch.tensor([0])}
    both = pipeline.transformer(noisy, torch.tensor([0]), **named).sample
    found = predicted(pipeline.transformer, noisy, torch.tensor([0]), named)
    assert both.shape[1] == 2 and torch.equal(found, both[:, :1])


@pytest.mark.parametrize("classes", [10, 1001])
def test_labels_that_the_pipeline_cannot_guide_away_from_are_refused(classes):
    with pytest.raises(ValueError, match=f"got a DiTTransformer2DModel with {classes}"):
        check_pipeline(pipelines.class_transformer(num_embeds_ada_norm=classes))


# ---- other transformers: cut and planned, not trained --------------------------------------


@pytest.mark.parametrize("name", few(["pixart", "sd3", "flux"], "sd3", "flux"))
def test_masked_and_slim_agree_on_every_transformer(name, monkeypatch):
    monkeypatch.setattr(cost, "FLUX_TOKENS", 4)
    dense = transformers.build(name)
    layout = depth.depth_layout(dense, depth.depth_groups(dense), 0.7, WITHIN)
    soft = SoftUNet(dense, layout).eval()
    soft.mask.copy_(flow.binarise(soft.mask, -soft.mask, layout.block, layout.keep_counts))
    # the last of each kind, so that what stays is counted anew
    soft.mask.copy_(torch.cat([part.flip(0) for part in soft.mask.split([*layout.sizes()])]))
    slim = surgery.perform(dense, layout, soft.mask).eval()
    assert type(slim) is type(dense) and 0.3 < unet_cost(slim).macs / unet_cost(dense).macs <= 0.7
    sample, times, named = transformers.inputs(dense)
    with torch.no_grad():
        masked = soft(sample, times, condition=named)
        found, before = (predicted(model, sample, times, named) for model in (slim, dense))
    assert torch.allclose(masked, found, atol=1e-5)
    assert not torch.allclose(found, before, atol=1e-3)


@pytest.mark.slow
def test_transformers_of_full_size_are_planned_on_the_meta_device():
    shapes = {
        "PixArt-XL": lambda: PixArtTransformer2DModel(caption_channels=4096),
        "SD3.5-medium": lambda: SD3Transformer2DModel(
            num_layers=24,
            num_attention_heads=24,
            caption_projection_dim=1536,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        ),
        "Flux": FluxTransformer2DModel,
    }
    for (name, build), granularity in itertools.product(shapes.items(), ("block", "unit", "both")):
        started = time.process_time()
        with torch.device("meta"):
            model = build()
        method = GradFlow(keep_macs=0.7, granularity=granularity)
        planned = forecast(SimpleNamespace(transformer=model), method, Training())
        assert time.process_time() - started < 60, (name, granularity)
        least = 0.65 if granularity == "block" else 0.69
        assert least < planned["macs"][2] / planned["macs"][0] <= 0.7, (name, granularity)
        assert planned["widths"][0].startswith("num_layers") == (granularity != "unit")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 3 * 2**20  # kilobytes
