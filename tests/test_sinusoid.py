"""The narrower sinusoid: whose frequencies it has, and what the layers that read it become."""

import itertools

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding

from builders import models, pruning
from compress.common.events import drain
from compress.methods.gradflow import OneShot
from compress.methods.gradflow.sinusoid import frequency_shifts, narrowed, readers
from compress.methods.training import Training


def test_every_shift_gives_frequencies_of_the_wider_sinusoid():
    times = torch.arange(0, 1000, 37)
    for half, shift, flip in itertools.product((4, 12, 16), (0, 1), (False, True)):
        dense = get_timestep_embedding(times, 2 * half, flip, shift)
        for count in range(1, half + 1):
            shifts = frequency_shifts(half, count, shift)
            assert shifts[0] == shift - (half - count)  # the first ones
            for stride, slim_shift in enumerate(shifts, start=1):
                kept = [stride * k for k in range(count)]
                assert kept[-1] < half
                slim = get_timestep_embedding(times, 2 * count, flip, slim_shift)
                # one rounding of an exponent of up to ln(10000), times up to 1000 timesteps
                assert (slim - dense[:, kept + [half + k for k in kept]]).abs().max() < 1e-4
    assert frequency_shifts(16, 8, 0) == [-8, 0]
    assert frequency_shifts(12, 12, 1) == [1]


def fitted_by_hand(values, wanted, weights, start):
    """Weighted least squares from a start, without the weakest directions of X'WX."""
    x = np.concatenate([values, np.ones((len(values), 1))], axis=1) * np.sqrt(weights)[:, None]
    squares, directions = np.linalg.eigh(x.T @ x)
    strong = squares > (1e-2**2) * squares.max()
    inverse = directions[:, strong] / squares[strong] @ directions[:, strong].T
    solution = start + inverse @ x.T @ (np.sqrt(weights)[:, None] * wanted - x @ start)
    return solution[:-1].T, solution[-1]


@pytest.mark.parametrize("timesteps", [50, 1000])
@pytest.mark.parametrize("labels", [None, "timestep"])
def test_the_layers_are_fitted_by_weighted_least_squares(timesteps, labels):
    changes = {"block_out_channels": (24, 16), "freq_shift": 1, "class_embed_type": labels}
    unet = models.build("no_attention", **changes)
    slim = narrowed(unet, 12, timesteps)
    assert slim.time_proj.num_channels == 12
    times = torch.arange(timesteps)
    values = slim.time_proj(times).double().numpy()
    for name in readers(unet):
        before, after = unet.get_submodule(name), slim.get_submodule(name)
        wanted = before(unet.time_proj(times)).detach().double().numpy()
        stride = frequency_shifts(12, 6, 1).index(slim.config.freq_shift) + 1
        kept = [stride * k for k in range(6)]
        columns = before.weight[:, kept + [12 + k for k in kept]]
        start = torch.column_stack([columns, before.bias]).detach().double().numpy().T
        weight, bias = fitted_by_hand(values, wanted, 1 / (1 + times.numpy()), start)
        np.testing.assert_allclose(after.weight.detach().numpy(), weight, atol=1e-4)
        np.testing.assert_allclose(after.bias.detach().numpy(), bias, atol=1e-4)
    assert len(readers(unet)) == 1 + (labels is not None)


def error_of(unet, slim, timesteps=1000) -> float:
    times = torch.arange(timesteps)
    total = 0.0
    for name in readers(unet):
        before = unet.get_submodule(name)(unet.time_proj(times))
        after = slim.get_submodule(name)(slim.time_proj(times))
        total += ((after - before).square().sum(1) / (1 + times)).sum().item()
    return total


def test_the_frequencies_with_the_smallest_error_are_taken_and_beat_dropped_columns():
    chosen = set()
    for factors in ([1, 1, 1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0, 1, 0]):
        unet = models.build("no_attention", block_out_channels=(16, 16))
        first = unet.time_embedding.linear_1
        with torch.no_grad():
            first.weight.mul_(torch.tensor([*factors, *factors]) + 0.01)
        slim = narrowed(unet, 8, 1000)
        # what is read is kept: the first four frequencies, or every other one
        stride = factors.index(1, 1)
        assert slim.config.freq_shift == frequency_shifts(8, 4, 0)[stride - 1]
        kept = [stride * k for k in range(4)]
        dropped = narrowed(unet, 8, 1000)
        dropped.time_embedding.linear_1.weight.data = first.weight[:, kept + [8 + k for k in kept]]
        dropped.time_embedding.linear_1.bias.data = first.bias
        assert error_of(unet, slim) < error_of(unet, dropped)
        chosen.add(stride)
    assert chosen == {1, 2}


def test_the_given_model_stays_and_a_sinusoid_as_wide_is_left_alone():
    unet = models.build("plain")
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    assert narrowed(unet, 8, 1000) is unet
    slim = narrowed(unet, 4, 1000)
    assert all(torch.equal(tensor, before[name]) for name, tensor in unet.state_dict().items())
    assert unet.time_proj.num_channels == 8 and unet.config.freq_shift == 0
    ours = dict(slim.named_parameters())
    assert [n for n, p in unet.named_parameters() if ours[n] is not p] == [
        "time_embedding.linear_1.weight",
        "time_embedding.linear_1.bias",
    ]


def test_large_weights_are_not_what_makes_the_fit():
    # every other frequency of a sinusoid: nearly collinear columns invite weights of hundreds
    unet = models.build("built_in")
    for width in (12, 16, 20):
        slim = narrowed(unet, width, 1000).time_embedding.linear_1
        assert slim.weight.abs().max() < 10 * unet.time_embedding.linear_1.weight.abs().max()


def test_a_run_fits_over_the_timesteps_of_its_schedule():
    unet = models.build("plain")
    method = OneShot(keep_macs=0.28, steps=0, criterion="magnitude", criterion_batches=1)
    run = pruning.start(method, Training(steps=0, batch=4), unet)
    timesteps = run.scheduler.config.num_train_timesteps
    assert timesteps != 1000
    expected = narrowed(unet, 4, timesteps).time_embedding.linear_1
    assert torch.equal(run.model.unet.time_embedding.linear_1.weight, expected.weight)
    pruned = drain(run.events()).model
    assert torch.equal(pruned.time_embedding.linear_1.weight, expected.weight)
    assert pruned.config.freq_shift == narrowed(unet, 4, timesteps).config.freq_shift
