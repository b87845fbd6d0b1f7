"""PixelPrune: its prediction, the encoder on a part of the patches, running models, refusals."""

import copy
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AttentionInterface, DynamicCache
from transformers.vision_utils import get_vision_window_index

from builders import vlm
from builders.fastocr import paper
from compress import PixelPrune
from compress.checkpoints.applied import Applied
from compress.methods.base import Shown
from compress.methods.pixelprune.encoder import FAMILIES, unit_pixels
from compress.methods.pixelprune.prediction import _close, _Places, distances, kept_units
from compress.models.cache_argument import cache_argument, cache_in
from compress.models.visual import ADAPTERS, VISUAL_LAYOUTS, build_prompt, text_model

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

STEPS = 4
GREEDY = {"max_new_tokens": STEPS, "min_new_tokens": STEPS, "do_sample": False}
LOGITS = {"return_dict_in_generate": True, "output_logits": True, **GREEDY}


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


# ---- prediction --------------------------------------------------------------------------------


def far(a, b, distance):
    differences = [abs(x - y) for x, y in zip(a, b, strict=True)]
    if distance == "max":
        return max(differences)
    if distance == "mae":
        return sum(differences) / len(differences)
    return (sum(d * d for d in differences) / len(differences)) ** 0.5


def coded(image, threshold, distance, forced=()):
    """The definition, unit by unit: which units of ``{(row, column): values}`` stay, and all."""

    def similar(a, b):
        return far(a, b, distance) <= threshold + 1e-9

    stays, known = {}, {}
    for (row, column), unit in sorted(image.items()):
        if (row, column) == (0, 0):
            predicted = None
        elif row == 0:
            predicted = known[row, column - 1]
        elif column == 0:
            predicted = known[row - 1, column]
        else:
            a, b, c = known[row, column - 1], known[row - 1, column], known[row - 1, column - 1]
            predicted = b if similar(c, a) and not similar(c, b) else a
        stays[row, column] = (
            predicted is None or (row, column) in forced or not similar(unit, predicted)
        )
        known[row, column] = unit if stays[row, column] else predicted
    return stays, known


def drawn(seed, rows, columns, levels):
    """Units of two values out of a few levels, so that many are alike."""
    numbers = random.Random(seed)
    return {
        (row, column): [numbers.randrange(levels) / 10 for _ in range(2)]
        for row in range(rows)
        for column in range(columns)
    }


SIZES = [(1, 1), (1, 7), (7, 1), (2, 2), (5, 9), (9, 4)]
IMAGES = [drawn(seed, *size, levels) for seed, size in enumerate(SIZES) for levels in (2, 3, 6)]
ALL_SIZES = [size for size in SIZES for _ in range(3)]


def flat(images):
    return torch.tensor([image[place] for image in images for place in sorted(image)])


def reconstructed(values, kept, sizes, threshold=0.0, distance="max"):
    """All units from those that stay: the inverse of ``kept_units``."""
    units = values.new_zeros(len(kept), values.shape[1])
    units[kept] = values
    places, close = _Places.of(sizes, units.device), _close(threshold, distance)
    for at in places.diagonals():
        predicted = units[places.predictors(units, at, close)]
        units[at] = torch.where(kept[at, None], units[at], predicted)
    return units


@pytest.mark.parametrize("distance", ["max", "mae", "rmse"])
@pytest.mark.parametrize("threshold", [0, 0.1, 0.2])
def test_a_batch_of_images_is_coded_as_the_definition_says_of_each(threshold, distance):
    units = flat(IMAGES)
    kept = kept_units(units, ALL_SIZES, threshold, distance)
    known = reconstructed(units[kept], kept, ALL_SIZES, threshold, distance)
    parts = [rows * columns for rows, columns in ALL_SIZES]
    for image, stays, values in zip(IMAGES, kept.split(parts), known.split(parts), strict=True):
        expected, meant = coded(image, threshold, distance)
        assert stays.tolist() == [expected[place] for place in sorted(image)]
        torch.testing.assert_close(values, torch.tensor([meant[place] for place in sorted(image)]))
    assert 0 < kept.sum() < len(units)
    if threshold:
        assert (distances(units, known, distance) <= threshold + 1e-5).all()
        assert not torch.equal(units, known)
    else:
        assert torch.equal(units, known)


def test_distances_are_those_of_numpy():
    a, b = torch.rand(5, 7), torch.rand(5, 7)
    difference = a.numpy() - b.numpy()
    for name, expected in (
        ("max", np.abs(difference).max(1)),
        ("mae", np.abs(difference).mean(1)),
        ("rmse", np.linalg.norm(difference, axis=1) / 7**0.5),
    ):
        torch.testing.assert_close(distances(a, b, name), torch.tensor(expected))


def test_equal_units_are_found_at_once_and_diagonal_by_diagonal():
    units = flat(IMAGES)
    assert torch.equal(kept_units(units, ALL_SIZES), kept_units(units, ALL_SIZES, 1e-4))


def test_a_vertical_edge_is_predicted_from_above():
    """Where the row above changes as this one does: the reason for C."""
    units = torch.tensor([[0.0], [1.0], [0.0], [1.0]])
    assert kept_units(units, [(2, 2)]).tolist() == [True, True, False, False]
    turned = torch.tensor([[0.0], [0.0], [1.0], [1.0]])
    assert kept_units(turned, [(2, 2)]).tolist() == [True, False, True, False]


def test_errors_do_not_add_up():
    """A ramp whose steps are below the threshold is not one colour."""
    ramp = torch.arange(20)[:, None] * 0.01
    kept = kept_units(ramp, [(1, 20)], 0.035)
    assert kept.nonzero()[:, 0].tolist() == [0, 4, 8, 12, 16]
    known = reconstructed(ramp[kept], kept, [(1, 20)], 0.035)
    assert (known - ramp).abs().max() <= 0.035


@pytest.mark.parametrize("threshold", [0, 0.1])
def test_a_blank_image_keeps_one_unit_or_as_many_as_it_must(threshold):
    blank, sizes = torch.full((30 + 4, 3), 0.5), [(5, 6), (2, 2)]
    assert kept_units(blank, sizes, threshold).nonzero()[:, 0].tolist() == [0, 30]
    kept = kept_units(blank, sizes, threshold, min_keep=0.5)
    assert [int(part.sum()) for part in kept.split([30, 4])] == [15, 2]
    assert kept[:30].view(5, 6).any(1).all() and kept[:30].view(5, 6).any(0).all()
    assert kept_units(blank, sizes, threshold, min_keep=1.0).all()


@pytest.mark.parametrize("threshold", [0, 0.1])
def test_what_must_stay_predicts_with_its_own_pixels(threshold):
    units = flat(IMAGES)
    fewer = kept_units(units, ALL_SIZES, threshold)
    kept = kept_units(units, ALL_SIZES, threshold, min_keep=0.7)
    parts = [rows * columns for rows, columns in ALL_SIZES]
    assert all(part.sum() >= 0.7 * len(part) for part in kept.split(parts))
    assert (kept | ~fewer).all() and kept.sum() > fewer.sum()
    known = reconstructed(units[kept], kept, ALL_SIZES, threshold)
    assert ((units - known).abs() <= threshold + 1e-5).all()


def test_units_are_the_pixels_of_a_visual_token():
    model, processor = vlm.build("qwen2_5_vl")
    page = vlm.page(64, 32, 0)  # 16 pixels a unit, and not resized
    images = processor.image_processor
    given = images([page], return_tensors="pt")
    assert given["image_grid_thw"].tolist() == [[1, 4, 8]]
    units = unit_pixels(given["pixel_values"], model.config.vision_config, images.image_std)
    pixels = torch.tensor(np.array(page)).permute(2, 0, 1) / 255
    shift = torch.tensor(images.image_mean)[:, None]
    for number, unit in enumerate(units.view(8, 4, 3, 64)):
        row, column = divmod(number, 4)
        block = pixels[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
        for patch, values in enumerate(unit):
            y, x = 8 * (patch // 2), 8 * (patch % 2)
            expected = block[:, y : y + 8, x : x + 8].flatten(1)
            torch.testing.assert_close(values + shift, expected, atol=1e-6, rtol=0)
    assert torch.equal(
        unit_pixels(given["pixel_values"], model.config.vision_config, None),
        given["pixel_values"].view(8, 4, 3, 2, 64)[:, :, :, 1].flatten(1),
    )


# ---- the encoder -------------------------------------------------------------------------------


def page(width, height, seed, written=0.4, paper=255):
    """Noise above, a blank below, and a line of noise in it."""
    pixels = np.array(vlm.page(width, height, seed))
    line = slice(height * 3 // 4, height * 3 // 4 + 6)
    noise = pixels[line].copy()
    pixels[round(height * written) :] = paper
    pixels[line] = noise
    return Image.fromarray(pixels)


PAGES = [page(160, 110, 0), page(96, 128, 1, 0.2)]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    model, processor = vlm.build(request.param)
    with torch.no_grad():
        for parameter in model.model.visual.parameters():  # so that attention is not even
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return request.param, model.eval(), processor


@pytest.fixture(scope="module")
def inputs(family):
    _, model, processor = family
    return dict(build_prompt(model, processor, PAGES, vlm.TEXTS))


def encoding(inputs):
    return {key: inputs[key] for key in ("pixel_values", "image_grid_thw")}


def stays(handle):
    """Which units stay of all pages, as the handle says it, ``(units,)``."""
    pages = []
    for one in handle.pages:
        kept = torch.zeros(len(one.grid), dtype=torch.bool)
        kept[one.kept] = True
        pages.append(kept)
    return torch.cat(pages)


def seen_by_the_kept(encoder, grid, kept):
    """Attention in which nobody sees the units that go, registered under a name.

    The dense encoder calls it for one window or image after the other.
    """
    patches = kept.repeat_interleave(4)
    if hasattr(encoder, "window_size"):
        order, _ = get_vision_window_index(grid, 2, encoder.window_size, encoder.patch_size)
        patches = kept[order].repeat_interleave(4)
    passed = 0

    def attention(module, query, key, value, attention_mask, scaling=None, **others):
        nonlocal passed
        count = query.shape[2]
        mask = patches[passed : passed + count]
        passed = (passed + count) % len(patches)
        scores = query @ key.transpose(2, 3) * scaling
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return (scores.softmax(-1) @ value).transpose(1, 2), None

    AttentionInterface.register("seen_by_the_kept", attention)


def test_the_encoder_on_what_stays_is_the_dense_one_where_nobody_sees_the_rest(family, inputs):
    _, model, _ = family
    encoder = model.model.visual
    with PixelPrune().attach(model) as handle:
        pruned = model.model.get_image_features(**encoding(inputs), return_dict=True)
    kept = stays(handle)
    assert 0.2 < kept.float().mean() < 0.8
    dense = model.model.get_image_features(**encoding(inputs), return_dict=True)
    before = encoder.config._attn_implementation
    seen_by_the_kept(encoder, inputs["image_grid_thw"], kept)
    encoder.config._attn_implementation = "seen_by_the_kept"
    try:
        expected = model.model.get_image_features(**encoding(inputs), return_dict=True)
    finally:
        encoder.config._attn_implementation = before
    layers = [[pruned.pooler_output], [expected.pooler_output], [dense.pooler_output]]
    if hasattr(pruned, "deepstack_features"):
        assert len(pruned.deepstack_features) == 1
        for outputs, one in zip(layers, (pruned, expected, dense), strict=True):
            outputs += one.deepstack_features
    for got, meant, other in zip(*layers, strict=True):
        assert [len(page) for page in got] == [len(page) for page in other]
        got, meant, other = (torch.cat(list(part)) for part in (got, meant, other))
        torch.testing.assert_close(got[kept], meant[kept], atol=1e-5, rtol=1e-4)
        assert not got[~kept].any()
        assert (got - other)[kept].abs().max() > 1e-3
    assert pruned.last_hidden_state.shape[0] in (4 * int(kept.sum()), int(kept.sum()))


# ---- the decoder -------------------------------------------------------------------------------


def left_of(model, inputs, method):
    """What the decoder is given of each prompt, token by token; pages are encoded by the method."""
    with method.attach(model) as handle:
        encoded = model.model.get_image_features(**encoding(inputs), return_dict=True)
    features = {"image": encoded}
    seen = []
    hook = text_model(model).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    more = {k: v for k, v in inputs.items() if k != "pixel_values"}
    model(**more, mm_encoder_outputs=features)
    hook.remove()
    [given] = seen
    kept = iter(stays(handle).tolist())
    visual = inputs["input_ids"] == model.config.image_token_id
    added, place, prompts = given.get("deepstack_visual_embeds"), 0, []
    for row, embeds in enumerate(given["inputs_embeds"]):
        places, adds = [], []
        for position in range(len(embeds)):
            stay = bool(inputs["attention_mask"][row, position])
            if visual[row, position]:
                stay = next(kept)
                if stay:
                    adds.append((len(places), place))
                place += 1
            if stay:
                places.append(position)
        ids = given["position_ids"][-3:, row, places]
        prompts.append((embeds[places], ids, adds, added))
    return prompts


def logits_of(model, prompt, answer):
    """Of the tokens of ``answer``, read without a cache behind a prompt that is all attended."""
    decoder = text_model(model)
    embeds, ids, adds, added = prompt
    start = len(embeds)
    behind = ids[:, -1:] + 1 + torch.arange(len(answer) - 1)
    embeds = torch.cat([embeds, decoder.embed_tokens(answer[:-1])])[None]
    length = embeds.shape[1]
    deepstack = {}
    if added is not None:
        visual = torch.zeros(1, length, dtype=torch.bool)
        visual[0, [at for at, _ in adds]] = True
        layers = [layer[[number for _, number in adds]] for layer in added]
        deepstack = {"visual_pos_masks": visual, "deepstack_visual_embeds": layers}
    hidden = decoder(
        inputs_embeds=embeds,
        attention_mask=torch.ones(length, length, dtype=torch.bool).tril()[None, None],
        position_ids=torch.cat([ids, behind], 1)[:, None],
        use_cache=False,
        **deepstack,
    ).last_hidden_state
    return model.lm_head(hidden[0, start - 1 :])


@pytest.mark.parametrize("settings", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_pages_are_read_as_token_by_token(family, inputs, settings):
    _, model, _ = family
    prompts = left_of(model, inputs, PixelPrune())
    with PixelPrune().attach(model):
        made = model.generate(**inputs, **LOGITS, **settings)
    answers = made.sequences[:, inputs["input_ids"].shape[1] :]
    logits = torch.stack(made.logits, 1)
    for row, prompt in enumerate(prompts):
        assert len(prompt[0]) < inputs["attention_mask"][row].sum()
        expected = logits_of(model, prompt, answers[row])
        torch.testing.assert_close(logits[row], expected, atol=1e-4, rtol=1e-4)


def test_beams_and_several_answers_share_a_page(family, inputs):
    _, model, _ = family
    prompts = left_of(model, inputs, PixelPrune())
    start = inputs["input_ids"].shape[1]
    with PixelPrune().attach(model) as handle:
        beams = model.generate(
            **inputs, **GREEDY, num_beams=2, return_dict_in_generate=True, output_scores=True
        )
        sampled = model.generate(**inputs, **(LOGITS | {"do_sample": True}), num_return_sequences=2)
        assert len(handle.pages) == 2 * len(PAGES)
    for score, answer, prompt in zip(
        beams.sequences_scores, beams.sequences[:, start:], prompts, strict=True
    ):
        chosen = logits_of(model, prompt, answer).log_softmax(-1).gather(1, answer[:, None])
        torch.testing.assert_close(score, chosen.sum() / STEPS, atol=1e-4, rtol=1e-4)
    for row, answer in enumerate(sampled.sequences[:, start:]):
        expected = logits_of(model, prompts[row // 2], answer)
        logits = torch.stack(sampled.logits, 1)[row]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_a_loop_of_calls_goes_on_from_the_original_position(family, inputs):
    """Without mask and position ids, which the model counts by the length of the cache."""
    _, model, processor = family
    alone = dict(build_prompt(model, processor, PAGES[:1], vlm.TEXTS[:1]))
    [prompt] = left_of(model, alone, PixelPrune())
    answer = torch.tensor([5, 9, 7, 11])
    with PixelPrune().attach(model):
        read = model(**alone)
        cache = {cache_argument(model): cache_in(read)}
        assert read.logits.shape[1] == len(prompt[0]) == cache_in(read).get_seq_length()
        one = model(input_ids=answer[None, :1], **cache)
        more = model(input_ids=answer[None, 1:3], **cache)
    got = torch.cat([read.logits[0, -1:], one.logits[0], more.logits[0]])
    torch.testing.assert_close(got, logits_of(model, prompt, answer), atol=1e-4, rtol=1e-4)


def test_a_batch_of_pages_is_one_by_one(family):
    _, model, processor = family
    pages = [page(80 + 16 * n, 96, n, 0.1 + 0.2 * n) for n in range(4)]
    texts = ["a", "all of it", "bc", "read"]
    method = PixelPrune(threshold=0.1, min_keep=0.3, image_std=(0.5, 0.5, 0.5))
    with method.attach(model) as handle:
        together = model(**build_prompt(model, processor, pages, texts)).logits[:, -1]
        batch, handle.pages = handle.pages, []
        for row, (one, text) in enumerate(zip(pages, texts, strict=True)):
            alone = model(**build_prompt(model, processor, [one], [text])).logits[0, -1]
            torch.testing.assert_close(together[row], alone, atol=1e-4, rtol=1e-4)
            assert torch.equal(batch[row].kept, handle.pages[row].kept)
    assert len({len(one.kept) for one in batch}) > 2


# ---- laws --------------------------------------------------------------------------------------


def traces(model):
    """What a method could leave behind."""
    return [
        (name, len(module._forward_pre_hooks), len(module._forward_hooks), sorted(vars(module)))
        for name, module in model.named_modules()
    ], copy.deepcopy(model.generation_config.to_dict())


def test_an_image_without_equal_units_is_the_dense_model_bit_by_bit(family):
    _, model, processor = family
    noisy = dict(build_prompt(model, processor, vlm.PAGES, vlm.TEXTS))
    before, dense = traces(model), model(**noisy).logits
    answer = model.generate(**noisy, **GREEDY)
    with PixelPrune().attach(model) as handle:
        assert torch.equal(model(**noisy).logits, dense)
        assert torch.equal(model.generate(**noisy, **GREEDY), answer)
        assert all(one["share"] == 1 for one in handle.facts()["pages"])
    assert traces(model) == before


def test_leaving_restores_bit_by_bit(family, inputs):
    _, model, _ = family
    before, dense = traces(model), model(**inputs).logits
    with PixelPrune().attach(model):
        pruned = model(**inputs).logits
    assert pruned.shape[1] < dense.shape[1] and traces(model) == before
    assert torch.equal(model(**inputs).logits, dense)
    with pytest.raises(KeyError, match="inside"), PixelPrune().attach(model):
        model(**inputs)
        raise KeyError("inside")
    assert traces(model) == before


def test_a_blank_page_is_read_by_one_token(family):
    _, model, processor = family
    blank = build_prompt(model, processor, [Image.new("RGB", (96, 96), "white")], ["a"])
    with PixelPrune().attach(model) as handle:
        read = model(**blank)
        assert handle.facts()["total"]["kept"] == 1
    places = int((blank["input_ids"] == model.config.image_token_id).sum())
    assert read.logits.shape[1] == blank["input_ids"].shape[1] - places + 1


def test_facts_count_the_units_of_each_page(family, inputs):
    _, model, _ = family
    method = PixelPrune()
    with method.attach(model) as handle:
        model(**inputs)
        facts = handle.facts()
        counts = [(one["units"], one["kept"]) for one in facts["pages"]]
        assert counts == [(len(one.grid), len(one.kept)) for one in handle.pages]
        assert all(len(one.dropped) == len(one.grid) - len(one.kept) for one in handle.pages)
        assert method.count([facts, facts]) == {
            "units_kept": sum(kept for _, kept in counts) / sum(units for units, _ in counts)
        }
        handle.reset()
        assert handle.facts() == {"pages": [], "total": {"units": 0, "kept": 0}}
        text = model(input_ids=torch.tensor([[1, 7, 8]])).logits
    assert torch.equal(text, model(input_ids=torch.tensor([[1, 7, 8]])).logits)
    assert method.count([]) == {}


def test_half_precision_drops_the_same_units():
    """They are compared before the pixels are rounded to the dtype of the model."""
    model, processor = vlm.build("qwen2_5_vl")
    levels = np.repeat(np.arange(200, 232, dtype=np.uint8), 16)[None, :, None].repeat(64, 0)
    image = Image.fromarray(levels.repeat(3, 2))
    inputs = dict(build_prompt(model, processor, [image], ["a"]))
    kept = []
    for dtype in (torch.float32, torch.bfloat16):
        with PixelPrune().attach(model.to(dtype)) as handle:
            model(**inputs)
        kept.append(handle.pages[0].kept)
    assert torch.equal(*kept) and len(kept[0]) > 16


# ---- with FastOCR, and the report --------------------------------------------------------------


@pytest.mark.parametrize("first", ["pixelprune", "fastocr"])
def test_fastocr_with_all_tokens_leaves_pixelprune_as_it_is(family, inputs, first):
    _, model, _ = family
    pruning, fixating = PixelPrune(), paper(keep_visual=1.0, focal_layers=[1], min_visual=0)
    result = []
    both = [pruning, fixating] if first == "pixelprune" else [fixating, pruning]
    for methods in ([pruning], both):
        with Applied(model, methods) as applied:
            result.append(model.generate(**inputs, **LOGITS))
            facts = applied.facts()
    assert torch.equal(result[0].sequences, result[1].sequences)
    for alone, stacked in zip(result[0].logits, result[1].logits, strict=True):
        torch.testing.assert_close(stacked, alone, atol=1e-4, rtol=1e-4)
    pages, counted = facts["pixelprune"]["total"], facts["fastocr"]
    assert counted["visual_tokens"] * len(PAGES) == pages["kept"] < pages["units"]
    assert counted["attended"] == 1


def test_other_methods_get_the_layouts_of_what_is_left(family, inputs):
    _, model, _ = family
    seen = []
    decoder = text_model(model)
    hook = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    with PixelPrune().attach(model) as handle:
        model(**inputs)
        encoded = model.model.get_image_features(**encoding(inputs), return_dict=True)
    hook.remove()
    [given] = seen
    for row, (layout, one) in enumerate(zip(given[VISUAL_LAYOUTS], handle.pages, strict=False)):
        assert torch.equal(layout.grid, one.grid[one.kept])
        at = given["inputs_embeds"][row, layout.positions]
        assert torch.equal(at, encoded.pooler_output[row][one.kept])


def test_the_report_greys_what_is_dropped():
    model, processor = vlm.build("qwen2_5_vl")
    image = page(160, 112, 0)
    method = PixelPrune()
    with method.attach(model) as handle:
        model(**build_prompt(model, processor, [image], ["a"]))
    facts = [handle.facts()]
    [section] = method.sections(Shown(model, processor, image, "a", (), facts))
    [figure] = section.figures
    kept, units = facts[0]["total"]["kept"], facts[0]["total"]["units"]
    assert figure.caption.startswith(f"{kept} of {units} units stay")
    assert section.notes == [
        f"Of the 1 pages {kept / units:.1%} to {kept / units:.1%} of the units stay, "
        f"{kept / units:.1%} on average."
    ]
    assert not handle.reset() and method.sections(Shown(model, processor, image, "a", (), []))


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted({"unlimited_ocr", *ADAPTERS} - {*FAMILIES, "deepseek_ocr"}))
def test_encoders_that_need_the_whole_grid_are_refused_by_name(kind):
    config = SimpleNamespace(
        model_type=kind, text_config=SimpleNamespace(layer_types=["full_attention"])
    )
    with pytest.raises(ValueError, match=r"got \S+ \(model_type='.*\), (which|whose) .*; choose a"):
        PixelPrune().attach(SimpleNamespace(config=config)).__enter__()


def refused(model, message, call):
    with PixelPrune().attach(model), pytest.raises(ValueError, match=message) as error:
        call()
    assert "PixelPrune" in str(error.value)


def test_calls_that_cannot_work_are_refused(family, inputs):
    _, model, processor = family
    refused(model, "got labels", lambda: model(**inputs, labels=inputs["input_ids"]))
    lookup = {"prompt_lookup_num_tokens": 2, "max_new_tokens": 3}
    alone = build_prompt(model, processor, PAGES[:1], vlm.TEXTS[:1])
    refused(model, "assisted generation", lambda: model.generate(**alone, **lookup))
    turned = dict(inputs)
    padding = (inputs["attention_mask"] == 0).sum(1).tolist()
    for key in ("input_ids", "attention_mask", "mm_token_type_ids"):
        rows = [row.roll(-by) for row, by in zip(inputs[key], padding, strict=True)]
        turned[key] = torch.stack(rows)
    refused(model, "padding on the left", lambda: model(**turned))
    cache = DynamicCache(config=model.config.text_config)
    model(input_ids=torch.tensor([[1, 5]] * 2), **{cache_argument(model): cache})
    refused(model, "a cache of 2", lambda: model(**inputs, **{cache_argument(model): cache}))
    frames = inputs["image_grid_thw"] * torch.tensor([2, 1, 1])
    pixels = inputs["pixel_values"].repeat(2, 1)
    refused(
        model,
        "one frame",
        lambda: model.model.get_image_features(pixel_values=pixels, image_grid_thw=frames),
    )
    refused(model, "being pruned already", lambda: PixelPrune().attach(model).__enter__())


def test_a_continued_cache_wants_the_mask_of_all_tokens(family, inputs):
    _, model, _ = family
    with PixelPrune().attach(model):
        made = model.generate(**inputs, **LOGITS)
        ids = torch.cat([made.sequences, torch.full((2, 2), 9)], 1)
        mask = torch.nn.functional.pad(inputs["attention_mask"], (0, STEPS + 2), value=1)
        turn = {"attention_mask": mask, cache_argument(model): cache_in(made), **LOGITS}
        with pytest.raises(ValueError, match="PixelPrune pruned the prompt in this cache"):
            model.generate(ids, **turn)
        second = model.generate(ids[:, -3:], **turn)  # the last of the answer was not read yet
    prompts = left_of(model, inputs, PixelPrune())
    whole = torch.cat([ids, second.sequences[:, 3:]], 1)[:, inputs["input_ids"].shape[1] :]
    for row, prompt in enumerate(prompts):
        expected = logits_of(model, prompt, whole[row])[-STEPS:]
        torch.testing.assert_close(
            torch.stack(second.logits, 1)[row], expected, atol=1e-4, rtol=1e-4
        )


def test_a_threshold_needs_the_normalisation_of_the_processor(tmp_path):
    model, processor = vlm.build("qwen2_5_vl")
    with pytest.raises(ValueError, match="give image_std"):
        PixelPrune(threshold=0.1).attach(model).__enter__()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    model.config._name_or_path = model.name_or_path = str(tmp_path)
    given = build_prompt(model, processor, PAGES[:1], ["a"])
    kept = []
    for std in ("auto", tuple(processor.image_processor.image_std), (0.01, 0.01, 0.01)):
        with PixelPrune(threshold=0.7, image_std=std).attach(model) as handle:
            model(**given)
        kept.append(handle.pages[0].kept.tolist())
    assert kept[0] == kept[1] and kept[2] == [0] and len(kept[1]) > 1


@pytest.mark.parametrize(
    "knobs",
    [{"threshold": -0.1}, {"threshold": 1}, {"min_keep": 1.1}, {"distance": "ssim"},
     {"image_std": (0.5, 0.5)}, {"image_std": (0.5, 0.5, 0)}, {"keep": 0.5}],
    ids=str,
)  # fmt: skip
def test_impossible_knobs_are_refused(knobs):
    with pytest.raises(ValueError):
        PixelPrune(**knobs)


def test_tables_say_what_was_asked_for():
    assert (PixelPrune().label(), PixelPrune().kept()) == ("pixelprune", "threshold 0")
    method = PixelPrune(threshold=0.02, distance="mae", min_keep=0.25)
    assert method.label() == "pixelprune, mae"
    assert method.kept() == "threshold 0.02, at least 25%"
