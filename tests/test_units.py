"""Attention heads and feed-forward channels of transformers: masks, surgery, and whole runs."""

import contextlib
import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import compress
from builders import transformers
from builders.events import leave
from builders.tiers import few
from compress.common import cost
from compress.common.cost import unet_cost
from compress.common.events import drain
from compress.common.journal import Journal
from compress.data.sources import load_images
from compress.methods.base import PruneJob
from compress.methods.gradflow import GradFlow, OneShot, depth, flow, obs, surgery
from compress.methods.gradflow import criterion as scoring
from compress.methods.gradflow.allocation import plan
from compress.methods.gradflow.masks import SoftUNet
from compress.methods.gradflow.train import PruningRun
from compress.methods.gradflow.unets import find_groups
from compress.methods.training import Training
from compress.models.free_width_transformer import (
    FreeWidthDiTTransformer2DModel,
    inner_widths_of,
)
from compress.models.objective import predicted
from compress.parallel import sharding

pytestmark = pytest.mark.usefixtures("quick_runs")

WAYS = {
    "unit": {"granularity": "unit"},
    "competing": {"granularity": "unit", "allocation": "global"},
    "both": {"granularity": "both"},
}
FLOW = {"steps": 4, "max_move": 0.8, "update_every": 1, "criterion_batches": 1}


@pytest.fixture(scope="module")
def digits():
    return load_images("builtin:digits", (16, 16), 1, "label")


@pytest.fixture(autouse=True)
def few_tokens(monkeypatch):
    # longer prompts would be nearly all of the cost of a tiny model
    for of_what in ("FLUX", "FLUX_PROMPT", "SD3_PROMPT", "PIXART_PROMPT"):
        monkeypatch.setattr(cost, f"{of_what}_TOKENS", 77 if "PROMPT" in of_what else 4)


def planned(model, way: str, keep: float):
    method = OneShot(keep_macs=keep, **WAYS[way])
    return plan(model, find_groups(model), method)[0]


# ---- masks and surgery ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "way"),
    few(itertools.product(transformers.FAMILIES, WAYS), ("dit", "unit"), ("sd3", "competing")),
)
def test_masked_and_slim_agree(name, way):
    dense = transformers.build(name)
    layout = planned(dense, way, 0.6)
    soft = SoftUNet(dense, layout).eval()
    scores = torch.rand(layout.units, generator=torch.Generator().manual_seed(3))
    chosen = flow.binarise(soft.mask, scores, layout.block, layout.keep_counts, layout.layers)
    sample, times, named = transformers.inputs(dense)
    with torch.no_grad():
        before = predicted(dense, sample, times, named)
        open_ = soft(sample, times, condition=named)
        soft.mask.copy_(chosen)
        masked = soft(sample, times, condition=named)
        slim = surgery.perform(dense, layout, soft.mask).eval()
        found = predicted(slim, sample, times, named)
    assert torch.allclose(open_, before, atol=1e-5)
    assert torch.allclose(masked, found, atol=1e-5)
    assert not torch.allclose(found, before, atol=1e-3)
    assert 0.5 < unet_cost(slim).macs / unet_cost(dense).macs <= 0.6
    assert unet_cost(surgery.slim_unet(dense, layout)) == unet_cost(slim)
    uneven = any(len(set(widths)) > 1 for widths in _by_branch(slim).values())
    assert uneven == (way == "competing")


def _by_branch(model) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for name, inner in inner_widths_of(model).items():
        stack, _, branch = name.split(".", 2)
        found.setdefault(f"{stack}.{branch}", []).append(inner.width)
    return found


def test_every_layer_keeps_a_unit():
    dense = transformers.build("dit")
    layout = planned(dense, "competing", 0.5)
    scores = torch.arange(layout.units).float()  # the last layers have the best units
    mask = flow.binarise(
        torch.ones(layout.units), scores, layout.block, layout.keep_counts, layout.layers
    )
    kept = torch.zeros(int(layout.layers.max()) + 1).index_add_(0, layout.layers, mask)
    assert kept.min() == 1 and kept.max() > 8
    surgery.check_mask(layout, mask)


def test_keeping_all_keeps_all_and_too_little_is_refused():
    dense = transformers.build("dit")
    for way in WAYS:
        layout = planned(dense, way, 1.0)
        assert layout.keep_counts.sum() == layout.units
    for way in ("unit", "competing"):
        with pytest.raises(ValueError, match=r"keep_macs must be at least 0\.\d+ .* one unit of"):
            planned(dense, way, 0.01)
    with pytest.raises(ValueError, match=r"one unit of every layer; got keep_macs=0\.05; raise"):
        planned(dense, "both", 0.05)


@pytest.mark.parametrize("keep", [0.9, 0.6])
def test_blocks_leave_to_units_what_whole_blocks_cannot_keep(keep):
    dense = transformers.build("dit")  # a block is about a quarter
    layout = planned(dense, "both", keep)
    slim = surgery.slim_unet(dense, layout)
    assert slim.config.num_layers == (4 if keep == 0.9 else 3)
    assert keep - 0.01 < unet_cost(slim).macs / unet_cost(dense).macs <= keep


def test_blocks_go_evenly_where_units_go_as_well(monkeypatch):
    # of four and four blocks of almost one price: six, as three and three
    grid = np.array([[a, b] for a in range(1, 5) for b in range(1, 5)])
    kept = grid @ [0.125001, 0.124999]
    monkeypatch.setattr(depth, "_legal_counts", lambda model, groups: (grid, kept))
    groups = [SimpleNamespace(units=4)] * 2
    assert depth.choose_counts(None, groups, 0.55, 0.01, units=True) == (3, 3)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ({"transformer_blocks.0": 8}, "name attentions and feed-forwards .* 'transformer_blocks"),
        ({"transformer_blocks.0.attn1": 12}, "multiple of the head's size, 8; got 12"),
        ({"transformer_blocks.0.attn1": 0}, "got 0"),
    ],
)
def test_impossible_widths_are_refused_by_name(widths, message):
    with pytest.raises(ValueError, match=message):
        FreeWidthDiTTransformer2DModel(**transformers.SIZES, inner_widths=widths)


# ---- from end to end -----------------------------------------------------------------------


@pytest.mark.parametrize("way", few(["competing", "both"], "both"))
def test_the_result_is_saved_with_its_class_and_not_pruned_again(family, digits, tmp_path, way):
    method = GradFlow(keep_macs=0.6, **FLOW, **WAYS[way])
    compressed = compress.apply(
        family("dit"), method, data=digits, training=Training(steps=1, batch=4)
    )
    assert compressed.report["surgery"]["max_difference"] <= 1e-5
    folder = compressed.save(tmp_path / "slim")
    index = json.loads((folder / "model_index.json").read_text())
    code = "compress.models.free_width_transformer"
    assert index["transformer"] == [code, "FreeWidthDiTTransformer2DModel"]
    card = (folder / "README.md").read_text()
    assert f"`transformer/{code}.py`" in card and "trust_remote_code=True" in card
    loaded = compress.load(folder)
    for key, value in compressed.model.transformer.state_dict().items():
        assert torch.equal(loaded.transformer.state_dict()[key], value), key
    with pytest.raises(ValueError, match="inner widths of its own; prune the model that it was"):
        find_groups(loaded.transformer)


def test_a_resumed_run_ends_with_the_same_weights(family, digits, tmp_path):
    def begin(folder=None, *, resume=False):
        method = GradFlow(keep_macs=0.6, **FLOW, **WAYS["competing"])
        settings = Training(steps=1, batch=4, save_every=1)
        return PruningRun(
            method, PruneJob(family("dit"), digits, settings, "cpu", Journal(folder), resume)
        )

    expected = drain(begin().events())
    leave(begin(tmp_path).events(), 4)  # after surgery
    found = drain(begin(tmp_path, resume=True).events())
    assert found.widths == expected.widths
    for key, value in expected.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[key], value), key


# ---- a rival -------------------------------------------------------------------------------


def test_units_that_compete_go_for_good_where_they_are_told_to(family, digits):
    method = GradFlow(keep_macs=0.6, process="hard", **FLOW, **WAYS["competing"])
    settings = Training(steps=1, batch=4)
    run = PruningRun(method, PruneJob(family("dit"), digits, settings, "cpu", Journal(None), False))
    leave(run.events(), 2)
    before = run._mask().clone()
    assert 0 < before.sum() < len(before)
    drain(run.events())
    assert run.mask_scheduler.state.returned == 0 and (run.kept <= before).all()
    surgery.check_mask(run.layout, run.kept)


def test_evenness_is_of_no_effect_on_units():
    assert "even_within" in GradFlow(keep_macs=0.6, granularity="unit").unused
    assert OneShot(keep_macs=0.6, granularity="unit").unused == {"even_within"}
    assert not OneShot(keep_macs=0.6, granularity="both").unused


def test_moments_that_do_not_fit_into_memory_are_refused(family, monkeypatch):
    dense = family("dit").transformer
    soft = SoftUNet(dense, planned(dense, "unit", 0.6))
    monkeypatch.setattr("compress.common.memory.memory", lambda device: (1000, 2000))
    with pytest.raises(ValueError, match="moments is held for each .* are free; choose another"):
        obs.hessians(soft, [], lambda batch: None, 50)


def test_obs_scores_what_no_refit_makes_up_for(family, digits):
    method = OneShot(keep_macs=0.6, granularity="unit", criterion="obs", criterion_batches=2)
    job = PruneJob(family("dit"), digits, Training(steps=1, batch=4), "cpu", Journal(None), False)
    run = PruningRun(method, job)
    soft, name = run._plain(), "transformer_blocks.1.attn1.to_out.0"
    run.mask_scheduler.estimate(soft)
    moment = run.mask_scheduler.moments[name]
    weight = soft.unet.get_submodule(name).weight.detach().double()
    root = torch.linalg.cholesky(moment)  # inputs with these second moments
    for unit in soft.layout.inputs[name].unique():
        stays = soft.layout.inputs[name] != unit
        wanted = (weight @ root).T
        fitted = torch.linalg.lstsq(root[stays].T, wanted).solution
        error = (root[stays].T @ fitted - wanted).square().sum()
        raw = obs.scores(soft, run.mask_scheduler.moments)[unit].double()
        assert torch.allclose(raw, error, rtol=1e-4)
    run.mask_scheduler.binarise(soft, 0)
    run.mask_scheduler.refit(soft)
    assert not run.mask_scheduler.moments
    kept = soft.layout.extend(soft.mask)[soft.layout.inputs[name]] > 0.5
    fitted = torch.linalg.lstsq(root[kept].T, wanted).solution.T.float()
    assert torch.allclose(soft.unet.get_submodule(name).weight[:, kept], fitted, atol=1e-4)
    with pytest.raises(ValueError, match="scores heads and feed-forward channels; got granul"):
        OneShot(criterion="obs")


def greedily(soft, name, moment) -> dict[int, torch.Tensor]:
    """The root of the error once a unit and all before it are gone, each time the least."""
    index = soft.layout.inputs[name]
    weight = soft.unet.get_submodule(name).weight.detach().double()
    root = torch.linalg.cholesky(moment)  # inputs with these second moments
    wanted, expected = (weight @ root).T, {}

    def error(units):
        stays = ~torch.isin(index, torch.tensor(units))
        kept = torch.linalg.lstsq(root[stays].T, wanted).solution
        return (root[stays].T @ kept - wanted).square().sum()

    left = index.unique().tolist()
    while left:
        errors = {unit: error([*expected, unit]) for unit in left}
        unit = min(errors, key=errors.__getitem__)
        expected[unit] = errors[unit].sqrt()
        left.remove(unit)
    return expected


def test_a_flow_by_obs_loses_first_what_the_rest_of_its_layer_makes_up_for(family, digits):
    method = GradFlow(keep_macs=0.6, granularity="both", criterion="obs", **FLOW)
    job = PruneJob(family("dit"), digits, Training(steps=1, batch=4), "cpu", Journal(None), False)
    run = PruningRun(method, job)
    soft, scheduler = run._plain(), run.mask_scheduler
    batches = run._criterion_batches(0)
    moments = scoring.obs_moments(soft, run.scheduler, batches)
    scheduler.estimate(soft)
    gates = list(soft.layout.gates.values())
    blocks = scoring.raw_scores(soft, run.scheduler, batches, criterion="taylor")[gates]
    assert torch.allclose(scheduler.state.scores[gates], blocks / blocks.mean())

    found = obs.greedy_scores(soft, moments)
    for name, moment in list(moments.items())[:2]:
        for unit, expected in greedily(soft, name, moment).items():
            assert torch.allclose(found[unit].double(), expected, rtol=1e-3)
    with pytest.raises(ValueError, match="got granularity 'block'; choose granularity 'unit' or"):
        GradFlow(criterion="obs", granularity="block")


def test_heads_and_channels_that_one_layer_reads_go_one_by_one():
    model = transformers.build("flux")
    soft = SoftUNet(model, planned(model, "unit", 0.6))
    [name, *_] = [name for name in soft.layout.inputs if name.endswith("proj_out")]
    width = model.get_submodule(name).in_features
    draws = torch.randn(2 * width, width, dtype=torch.float64)
    moment = draws.T @ draws / len(draws)
    found = obs.greedy_scores(soft, {name: moment})
    expected = greedily(soft, name, moment)
    assert len({int((soft.layout.inputs[name] == unit).sum()) for unit in expected}) == 2
    assert all(torch.allclose(found[u].double(), e, rtol=1e-3) for u, e in expected.items())


def test_blocks_keep_the_scores_of_the_dense_model_and_units_learn(family, digits):
    method = GradFlow(keep_macs=0.6, granularity="both", **FLOW | {"score_ema": 0.0})
    job = PruneJob(family("dit"), digits, Training(steps=1, batch=4), "cpu", Journal(None), False)
    run = PruningRun(method, job)
    events, state = run.events(), run.mask_scheduler.state
    while run.step < 1:
        next(events)
    first = state.scores.clone()
    while run.step < 3:
        next(events)
    gates = torch.zeros(len(first), dtype=torch.bool)
    gates[list(run.layout.gates.values())] = True
    assert torch.allclose(state.scores[gates], first[gates])
    assert not torch.allclose(state.scores[~gates], first[~gates], rtol=1e-2)


def test_obs_refits_where_cut_weights_are_gathered_for_the_cut(family, digits, monkeypatch):
    """What is changed in gathered weights is gone once they are cut again."""

    @contextlib.contextmanager
    def gathered(network):
        before = {name: p.detach().clone() for name, p in network.named_parameters()}
        yield
        with torch.no_grad():
            for name, p in network.named_parameters():
                p.copy_(before[name])

    def pruned():
        method = OneShot(keep_macs=0.6, granularity="unit", criterion="obs", steps=0)
        training = Training(steps=1, batch=4, ema=0.0)
        job = PruneJob(family("dit"), digits, training, "cpu", Journal(None), False)
        return drain(PruningRun(method, job).events())

    expected = pruned()
    monkeypatch.setattr(sharding, "whole", gathered)
    found = pruned()
    for key, value in expected.model.state_dict().items():
        assert torch.equal(found.model.state_dict()[key], value), key
