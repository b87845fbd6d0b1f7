"""A narrower timestep sinusoid, with the layers that read it fitted to what they read before.

A slim model's first level is narrower, and so is the sinusoid that diffusers derives from it. It
has no weights: what it loses, only the layers that read it can make up for.
"""

import copy

import torch
from diffusers.models.embeddings import Timesteps
from torch import nn

from compress.methods.gradflow.groups import UNet

# along directions of the sinusoid this much weaker than its strongest weights do not change: they
# would become too large for half precision
WEAKEST = 1e-2


def readers(unet: UNet) -> tuple[str, ...]:
    """The layers that read the sinusoid as wide as the first level."""
    if unet.config.class_embed_type == "timestep":  # a label goes through the same sinusoid
        return ("time_embedding.linear_1", "class_embedding.linear_1")
    return ("time_embedding.linear_1",)


def frequency_shifts(half: int, kept: int, shift: float) -> list[float]:
    """Each ``freq_shift`` by which ``kept`` frequencies are some of a wider sinusoid's ``half``.

    Frequency ``i`` of ``half`` is ``10000 ** (-i / (half - shift))``. Every ``r``-th one, from the
    first, is again such a series, with ``kept - shift' = (half - shift) / r`` (a negative
    ``shift'`` is legal). For each stride ``r`` that leaves enough frequencies there is one.
    """
    strides = range(1, (half - 1) // (kept - 1) + 1) if kept > 1 else (1,)
    return [kept - (half - shift) / stride for stride in strides]


def narrowed(unet: UNet, width: int, timesteps: int) -> UNet:
    """The same model with a narrower sinusoid; it shares all parameters but those fitted.

    The layers that read the sinusoid get the weights and biases whose outputs are nearest to the
    ones before, over ``t = 0 .. timesteps - 1``: weighted least squares in float64, in closed form
    and without data. The weight ``1 / (t + 1)`` counts every octave of ``t`` alike, because where
    there is little noise, networks are sensitive to small differences of ``t`` (our choice: on the
    built-in model it leaves a third of the rise of the loss that equal weights leave). Of the
    frequencies that a plain configuration can have, those with the smallest error are taken.

    Parameters
    ----------
    unet : not modified.
    width : values of the new sinusoid, a sine and a cosine for each frequency.
    timesteps : of the noise schedule.
    """
    old = unet.time_proj
    if width == old.num_channels:
        return unet
    half, shift = old.num_channels // 2, old.downscale_freq_shift
    layers = [unet.get_submodule(name) for name in readers(unet)]
    # a last row for the biases, a last column of ones for them to act on
    weights = torch.cat(
        [torch.column_stack([layer.weight, layer.bias]).detach() for layer in layers]
    )
    weights = weights.T.cpu().double()
    times = torch.arange(timesteps)
    root = (times + 1.0).double().rsqrt()[:, None]

    def values(sinusoid: Timesteps) -> torch.Tensor:
        return root * torch.cat([sinusoid(times), torch.ones(timesteps, 1)], dim=1).double()

    wanted, fits = values(old) @ weights, []
    for stride, candidate in enumerate(frequency_shifts(half, width // 2, shift), start=1):
        if unet.config.get("addition_embed_type") == "text_time" and candidate != shift:
            continue  # the sinusoid of SDXL's sizes and crops has the same shift
        sinusoid = Timesteps(width, old.flip_sin_to_cos, candidate)
        kept = stride * torch.arange(width // 2)
        known = weights[torch.cat([kept, half + kept, torch.tensor([2 * half])])]
        missing = wanted - values(sinusoid) @ known
        change = torch.linalg.lstsq(values(sinusoid), missing, rcond=WEAKEST, driver="gelsd")
        solution = known + change.solution
        error = (values(sinusoid) @ solution - wanted).square().sum().item()
        fits.append((error, candidate, sinusoid, solution))
    _, shift, sinusoid, solution = min(fits, key=lambda fit: fit[0])
    result = copy.deepcopy(unet, {id(p): p for p in unet.parameters()})
    result.time_proj = sinusoid
    result.register_to_config(freq_shift=int(shift) if float(shift).is_integer() else shift)
    parts = solution.split([layer.out_features for layer in layers], dim=1)
    for name, layer, part in zip(readers(unet), layers, parts, strict=True):
        fitted = result.get_submodule(name)
        fitted.in_features = width
        fitted.weight = nn.Parameter(part[:-1].T.contiguous().to(layer.weight))
        fitted.bias = nn.Parameter(part[-1].to(layer.bias))
    return result
