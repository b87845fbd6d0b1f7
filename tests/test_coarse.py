"""Coarse masks: neighbouring channels of one selection block move together."""

import pytest
import torch

from builders import models
from compress.methods.gradflow import GradFlow, surgery
from compress.methods.gradflow.coarse import COARSE_CHANNELS, COARSE_REFRESH, coarsen
from compress.methods.gradflow.flow import binarise
from compress.methods.gradflow.mask_scheduler import MaskScheduler
from compress.methods.gradflow.masks import SoftUNet

CASES = [
    ("built_in", (12, 16, 32, 64)),
    ("plain", (4, 8)),
    ("one_head", (4, 8)),
    ("scale_shift", (4, 12)),
    ("odd_norm_groups", (6, 12)),
    ("deeper", (4, 12, 16)),
]


@pytest.mark.parametrize(("name", "widths"), CASES)
def test_a_coarse_mask_is_a_fine_one_whose_neighbours_are_equal(name, widths):
    fine = models.layout(name, widths)
    coarse = coarsen(fine)
    assert coarse.units <= fine.units
    if name in ("built_in", "one_head"):
        assert coarse.units < fine.units
    # what each coarse unit is in fine units: all places of all modules must agree on it
    members: dict[int, set[int]] = {}
    for table in ("inputs", "outputs", "norms", "queries"):
        tables = getattr(fine, table), getattr(coarse, table)
        assert list(tables[0]) == list(tables[1])
        for module, index in tables[0].items():
            for one, other in zip(index.tolist(), tables[1][module].tolist(), strict=True):
                if one == fine.units:  # never masked
                    assert other == coarse.units
                else:
                    members.setdefault(other, set()).add(one)
    assert sorted(members) == list(range(coarse.units))
    assert sorted(u for found in members.values() for u in found) == list(range(fine.units))
    units = torch.cat([torch.full((g.units,), g.unit) for g in fine.groups])
    for unit, found in members.items():
        # neighbours, in one block, and no more channels than allowed
        assert sorted(found) == list(range(min(found), max(found) + 1))
        assert len({int(fine.block[u]) for u in found}) == 1
        assert int(coarse.block[unit]) == int(fine.block[min(found)])
        assert len(found) == 1 or len(found) * units[min(found)] <= COARSE_CHANNELS
    # every block keeps the same channels in number
    size = torch.tensor([len(members[u]) for u in range(coarse.units)])
    for block, count in enumerate(coarse.keep_counts.tolist()):
        (together,) = set(size[coarse.block == block].tolist())
        assert count * together == fine.keep_counts[block]


def test_one_channel_changes_nothing():
    fine = models.layout("plain", (4, 8))
    same = coarsen(fine, channels=1)
    assert (same.groups, same.offsets, same.units) == (fine.groups, fine.offsets, fine.units)
    assert torch.equal(same.block, fine.block) and torch.equal(same.keep_counts, fine.keep_counts)
    for table in ("inputs", "outputs", "norms"):
        for module, index in getattr(fine, table).items():
            assert torch.equal(getattr(same, table)[module], index)


@pytest.mark.parametrize(("name", "widths"), CASES)
def test_masked_equals_slim(name, widths):
    unet, layout = models.build(name), coarsen(models.layout(name, widths))
    soft = SoftUNet(models.narrowed(unet, layout), layout).eval()
    soft.mask.copy_(models.binary_mask(layout))
    soft.adopt_slim_membership()
    slim = surgery.perform(soft.unet, layout, soft.mask).eval()
    assert tuple(slim.config.block_out_channels) == widths
    with torch.no_grad():
        sample, timestep = models.inputs(unet)
        difference = soft(sample, timestep) - slim(sample, timestep).sample
    assert difference.abs().max() < 1e-5


def test_channels_under_one_mask_stay_or_go_together():
    layout = coarsen(models.layout("built_in", (12, 16, 32, 64)))
    scores = torch.rand(layout.units, generator=torch.Generator().manual_seed(0))
    mask = binarise(torch.ones(layout.units), scores, layout.block, layout.keep_counts)
    surgery.check_mask(layout, mask)
    extended = layout.extend(mask) > 0.5
    together = 0
    for group in layout.groups:
        for slot in group.slots:
            table = {"in": layout.inputs, "out": layout.outputs, "norm": layout.norms}[slot.side]
            kept = extended[table[slot.module]][list(slot.positions)]
            for unit in range(group.units):
                here = [c // group.unit == unit for c in slot.channels]
                assert len(set(kept[torch.tensor(here)].tolist())) == 1
                together += group.unit > 1
    assert together


@pytest.mark.parametrize(("granularity", "every"), [("fine", 2), ("coarse", 2 * COARSE_REFRESH)])
def test_coarse_masks_are_scored_less_often(granularity, every):
    unet = models.build("plain")
    method = GradFlow(
        granularity=granularity,
        criterion="random",
        steps=20,
        update_every=1,
        criterion_every=2,
        settle=0,
        max_move=1,
    )
    layout = models.layout("plain", (4, 8))
    scheduler = MaskScheduler(
        method, layout, None, lambda number: [], step_rate=1.0, seed=0, device=torch.device("cpu")
    )
    soft, estimates = SoftUNet(unet, layout), []
    for step in range(20):
        before = scheduler.state.estimates
        scheduler.move(soft, step)
        if scheduler.state.estimates > before:
            estimates.append(step)
    assert estimates == list(range(0, 20, every))
