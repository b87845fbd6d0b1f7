"""FastOCR on a tiny real model of every family, against an oracle that knows no batch."""

import gc
import json
import threading
from contextlib import contextmanager
from dataclasses import asdict

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.masking_utils import sdpa_mask

import compress.methods.fastocr.state
from builders import fastocr
from builders.fastocr import PAGES, TEXTS, paper, write
from builders.tiers import few
from builders.vlm import FAMILIES
from compress.checkpoints.runtime import load_runtime
from compress.methods.fastocr import FastOCR
from compress.methods.fastocr.attention import NAME, STATE
from compress.methods.fastocr.calibration import calibrate
from compress.methods.fastocr.fixation import budget, random_fixation, same_mean_budget
from compress.methods.fastocr.hooks import decoder
from compress.methods.fastocr.preflight import preflight
from compress.models.cache_argument import cache_argument, cache_in
from compress.models.locate import locate
from compress.models.visual import (
    VISUAL_LAYOUTS,
    build_prompt,
    text_model,
    visual_layouts,
)
from compress.models.vlm import load_vlm

# transformers' GLM processor hands tensors to numpy.array
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    model, processor = fastocr.model(request.param)
    return request.param, model, processor, build_prompt(model, processor, PAGES, TEXTS)


@pytest.fixture(scope="module")
def dense(family):
    """What the family writes without the method."""
    _, model, _, inputs = family
    return write(model, inputs)


@pytest.fixture(scope="module")
def intern():
    """With plain position ids, for loops of one's own: Qwen's are generate's business."""
    model, processor = fastocr.model("internvl", layers=4)
    return model, processor, build_prompt(model, processor, PAGES, TEXTS)


@pytest.fixture(scope="module")
def qwen():
    model, processor = fastocr.model("qwen2_5_vl", layers=4)
    return model, processor, build_prompt(model, processor, PAGES, TEXTS)


# ---- the oracle: one sequence, plain lists, dense attention with minus infinity ---------------


class Oracle:
    """The method written once more, for one sequence without padding."""

    def __init__(
        self,
        positions,
        keep,
        focal=(),
        dense=(),
        least=0,
        reuse=True,
        min_mass=0.0,
        fixed=None,
        head_reduce="mean",
    ):
        self.positions, self.focal, self.dense = positions, focal, dense
        self.kept = min(len(positions), max(budget(keep, len(positions)), least))
        self.head_reduce = head_reduce
        self.reuse, self.min_mass, self.fixed = reuse, min_mass, fixed
        self.step, self.last, self.open = -1, None, False
        self.own = {}
        self.refreshes = 0
        self.attended = []  # (step, layer) in order

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **others):
        layer = module.layer_idx
        group = query.shape[1] // key.shape[1]
        logits = (query @ key.repeat_interleave(group, 1).transpose(2, 3)) * scaling
        if attention_mask is not None:
            logits = logits.masked_fill(~attention_mask, -torch.inf)
        elif query.shape[2] > 1:
            logits = logits + torch.full(logits.shape[2:], -torch.inf).triu(1)
        if query.shape[2] == 1:
            if layer == 0:
                self.step, self.open = self.step + 1, False
            heads = logits.softmax(-1)[0, :, 0]
            weights = heads.amax(0) if self.head_reduce == "max" else heads.mean(0)
            seen = self.seen(layer, weights[self.positions])
            hidden = [p for i, p in enumerate(self.positions) if i not in seen]
            logits[..., hidden] = -torch.inf
            self.attended.append(len(self.positions) - len(hidden))
        output = logits.softmax(-1) @ value.repeat_interleave(group, 1)
        return output.transpose(1, 2), None

    def seen(self, layer, weights):
        everything = set(range(len(self.positions)))
        share = (weights / weights.sum()).tolist()
        best = sorted(everything, key=lambda i: -share[i])
        if self.fixed == "oracle":
            return set(best[: self.kept]) if self.step else everything
        if self.fixed:
            if self.step == 0:
                self.own[layer] = self.fixed(layer, best)
                return everything
            return self.own[layer]
        if layer in self.focal:
            if self.step and sum(share[i] for i in self.last) < self.min_mass:
                self.refreshes += not self.open
                self.open = True
            self.last = set(best[: self.kept])
            return everything
        if (
            self.step == 0
            or self.open
            or layer in self.dense
            or (layer < min(self.focal) and not self.reuse)
        ):
            return everything
        return self.last


@contextmanager
def _through(model, function):
    """The decoder's attention through ``function``."""
    AttentionInterface.register("fastocr_oracle", function)
    AttentionMaskInterface.register("fastocr_oracle", sdpa_mask)
    config = text_model(model).config
    before = config._attn_implementation
    config._attn_implementation = "fastocr_oracle"
    try:
        yield
    finally:
        config._attn_implementation = before


def _check(model, rows, result, atol=1e-5, **settings):
    """Each sequence's logits against the oracle's, which writes the same tokens.

    Parameters
    ----------
    rows : inputs of one sequence each.
    found : (tokens, logits) of the batch.
    settings : of the oracle; ``fixed`` is given the visual tokens first.
    """
    oracles = []
    for inputs, tokens, logits in zip(rows, *result, strict=True):
        positions = visual_layouts(model, inputs)[0].positions.tolist()
        mine = dict(settings)
        if callable(mine.get("fixed")):
            mine["fixed"] = mine["fixed"](len(positions))
        oracle = Oracle(positions, **mine)
        length = inputs["input_ids"].shape[1]
        forced = tokens.tolist()

        def allowed(_, ids, forced=forced, length=length):
            return [forced[len(ids) - length]]

        with _through(model, oracle):
            _, expected = write(model, inputs, len(forced) - 1, prefix_allowed_tokens_fn=allowed)
        torch.testing.assert_close(logits, expected[0], atol=atol, rtol=0)
        oracles.append(oracle)
    return oracles


def _alone(model, processor):
    return [
        build_prompt(model, processor, [page], [text])
        for page, text in zip(PAGES, TEXTS, strict=True)
    ]


def _spied(monkeypatch):
    """Rows that each sparse layer reads from now on."""
    gathered = []
    sparse = compress.methods.fastocr.state.sparse_decode

    def spy(query, key, value, rows, rows_mask, dense, dense_mask, scaling):
        gathered.append(rows.shape[1] + dense[1] - dense[0])
        return sparse(query, key, value, rows, rows_mask, dense, dense_mask, scaling)

    monkeypatch.setattr(compress.methods.fastocr.state, "sparse_decode", spy)
    return gathered


# ---- every family ----------------------------------------------------------------------------


def test_all_visual_tokens_through_the_gather_are_dense_decoding(family, dense, monkeypatch):
    name, model, _, inputs = family
    tokens, logits = dense
    gathered = _spied(monkeypatch)
    with paper(keep_visual=1.0, focal_layers=[1]).attach(model) as handle:
        found_tokens, found_logits = write(model, inputs)
        facts = handle.facts()
    assert torch.equal(found_tokens, tokens)
    torch.testing.assert_close(found_logits, logits, atol=1e-4, rtol=0)
    assert len(gathered) == 3  # layer 0 in every step but the first
    assert facts["attended_by_layer"] == [1.0, 1.0] and facts["steps"] == 4 * len(PAGES)
    # and the context left nothing behind
    again_tokens, again_logits = write(model, inputs)
    assert torch.equal(again_tokens, tokens) and torch.equal(again_logits, logits)
    assert len(gathered) == 3


def test_summaries_that_open_all_tokens_or_are_one_each_are_dense_decoding(family, dense):
    name, model, processor, inputs = family
    choose = ("summaries", "signs")[list(FAMILIES).index(name) % 2]  # each in several families
    tokens, logits = dense
    most = max(len(layout.positions) for layout in visual_layouts(model, inputs))
    with paper(choose=choose, keep_visual=1.0, min_visual=0).attach(model) as handle:
        found_tokens, found_logits = write(model, inputs)
        assert handle.facts()["attended_by_layer"] == [1.0, 1.0]
    assert torch.equal(found_tokens, tokens) and torch.equal(found_logits, logits)
    one_each = paper(choose=choose, keep_visual=0.05, periphery=most, groups="runs")
    for settings in ({}, {"cache_implementation": "static"}):
        with one_each.attach(model):
            found_tokens, found_logits = write(model, inputs, 2, **settings)
        assert torch.equal(found_tokens, tokens[:, :3])
        torch.testing.assert_close(found_logits, logits[:, :2], atol=1e-4, rtol=0)


@pytest.mark.parametrize("other", few([0, 1], 0), ids=["one layer", "the other"])
def test_sparse_steps_are_dense_attention_with_minus_infinity(family, other):
    name, model, processor, inputs = family
    # above the other, or below: each in several families
    focal = [(list(FAMILIES).index(name) + other) % 2]
    steps = 3
    with paper(keep_visual=0.05, focal_layers=focal).attach(model) as handle:
        result = write(model, inputs, steps)
        facts = handle.facts()
    oracles = _check(model, _alone(model, processor), result, keep=0.05, focal=focal)
    offered = sum(len(oracle.positions) for oracle in oracles) * steps
    attended = [sum(sum(oracle.attended[layer::2]) for oracle in oracles) for layer in (0, 1)]
    assert facts["attended_by_layer"] == [number / offered for number in attended]
    assert attended[focal[0]] == offered and attended[1 - focal[0]] < 0.5 * offered


@pytest.mark.parametrize("focal", [[0], [1]], ids=["focal above", "reuse"])
def test_the_window_over_the_answer_slides(focal):
    # without padding: transformers' dense logits of a padded batch are off once the window slides
    model, processor = fastocr.model("unlimited_ocr")
    inputs = _alone(model, processor)[0]
    with paper(keep_visual=0.05, focal_layers=focal).attach(model):
        result = write(model, inputs, 12)  # the window has 8
    _check(model, [inputs], result, keep=0.05, focal=focal)


def test_leaving_restores_everything_after_an_error_too(family):
    _, model, _, inputs = family
    base, text = model.base_model, text_model(model)

    modules = [layer.self_attn for layer in text.layers]

    def state():
        return (
            [len(base._forward_pre_hooks), len(text._forward_pre_hooks), len(text._forward_hooks)],
            [module.config._attn_implementation for module in modules],
            model.config.get_text_config()._attn_implementation,
            sorted(vars(model)),
        )

    before = state()
    with pytest.raises(KeyError, match="mine"), paper(focal_layers=[0]).attach(model):
        assert all(new > old for new, old in zip(state()[0], before[0], strict=True))
        assert set(state()[1]) == {NAME}
        assert "fastocr" not in json.dumps(model.config.to_dict(), default=str)
        raise KeyError("mine")
    assert state() == before


def test_long_answers_are_counted_to_the_last_step():
    counts = compress.methods.fastocr.state.Counts(2)
    for step in range(150):
        counts.start_step(1, 10, torch.device("cpu"))
        counts.attend(0, 10)
        counts.attend(1, torch.tensor(3) if step % 2 else 1)
        if step == 30:
            assert counts.facts()["steps"] == 31
    assert counts.facts()["attended_by_layer"] == [1.0, 0.2]
    counts.reset()
    assert counts.facts()["attended"] is None


# ---- caches, batches, modes --------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", few(FAMILIES, "qwen2_5_vl", "internvl", "unlimited_ocr"), indirect=True
)
def test_static_cache_gives_what_the_dynamic_one_gives(family, monkeypatch):
    _, model, _, inputs = family
    gathered = _spied(monkeypatch)
    with paper(keep_visual=0.1, focal_layers=[1]).attach(model):
        dynamic_tokens, dynamic = write(model, inputs, 3)
        of_dynamic = [*gathered]
        static_tokens, static = write(model, inputs, 3, cache_implementation="static")
    assert len(of_dynamic) == 2 and of_dynamic[1] == of_dynamic[0] + 1
    # of a static cache all rows are offered in every step, and a mask hides what is not written
    assert gathered[2:] == [of_dynamic[1]] * 2
    assert torch.equal(static_tokens, dynamic_tokens)
    torch.testing.assert_close(static, dynamic, atol=1e-5, rtol=0)


@pytest.mark.gpu
def test_on_a_gpu_the_kernels_write_what_plain_torch_writes(family, monkeypatch):
    _, model, _, inputs = family
    result = {}
    try:
        model.cuda()
        inputs = {
            name: part.cuda() if isinstance(part, torch.Tensor) else part
            for name, part in inputs.items()
        }
        for backend in ("torch", "triton"):
            monkeypatch.setenv("COMPRESS_KERNELS", backend)
            with paper(keep_visual=0.1, focal_layers=[1]).attach(model):
                result[backend] = write(model, inputs)
    finally:
        model.cpu()
    assert torch.equal(result["triton"][0], result["torch"][0])
    torch.testing.assert_close(result["triton"][1], result["torch"][1], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "knobs",
    [
        {"focal_layers": [1]},
        {"focal_layers": [3, 1], "reuse": False},
        {"focal_layers": [2], "reuse": False},
        {"focal_layers": [0, 2], "min_mass": 0.08},
        {"focal_layers": [1], "min_mass": 0.99},
    ],
    ids=str,
)
def test_knobs_on_four_layers(qwen, knobs):
    model, processor, inputs = qwen
    with paper(keep_visual=0.1, **knobs).attach(model) as handle:
        result = write(model, inputs, 6)
        facts = handle.facts()
    settings = {**knobs, "focal": knobs["focal_layers"]}
    del settings["focal_layers"]
    oracles = _check(model, _alone(model, processor), result, keep=0.1, **settings)
    refreshes = sum(oracle.refreshes for oracle in oracles)
    assert facts["refreshes"] == refreshes / facts["steps"]
    if "min_mass" in knobs:
        assert refreshes
    if knobs.get("min_mass") == 0.08:  # some jump while others of the batch do not
        assert refreshes < 5 * len(oracles)


@pytest.mark.parametrize("fixation", ["static", "random", "window"])
def test_fixed_fixations_attend_to_the_same_mean_number(qwen, fixation):
    model, processor, inputs = qwen
    with paper(keep_visual=0.05, focal_layers=[1]).attach(model) as handle:
        write(model, inputs, 6)
        dynamic = handle.facts()
    with paper(keep_visual=0.05, focal_layers=[1], fixation=fixation, seed=5).attach(
        model
    ) as handle:
        result = write(model, inputs, 6)
        facts = handle.facts()
    # rounding up gives the fixed ones a part of a token more, in a page of 60 tokens and up
    assert 0 <= facts["attended"] - dynamic["attended"] < 1 / 60
    assert len(set(facts["attended_by_layer"])) == 1

    def fixed(tokens):
        kept = same_mean_budget(budget(0.05, tokens), tokens, 4, 1)

        def choose(layer, best):
            if fixation == "static":
                return set(best[:kept])
            if fixation == "window":
                return set(range(tokens - kept, tokens))
            return set(random_fixation([tokens], [kept], 5 + layer).index[0].tolist())

        return choose

    _check(model, _alone(model, processor), result, keep=0.05, fixed=fixed)


# ---- later turns, and inputs without what processors add -----------------------------------------


def _conversation(model, turns, answers=((), ())):
    """Turns into one cache, each given all ids so far; the tokens of some answers are forced.

    Yields
    ------
    tokens and logits of each answer, and the length of all before the next turn.
    """
    before = mask = turns[0]["input_ids"][:, :0]
    cache = {}
    for inputs, answer in zip(turns, answers, strict=True):
        ids = torch.cat([before, inputs["input_ids"]], 1)
        mask = torch.cat([mask, inputs["attention_mask"]], 1)
        types = {}
        if "mm_token_type_ids" in inputs:
            types["mm_token_type_ids"] = (ids == model.config.image_token_id).long()
        forced = {}
        if len(answer):
            start = ids.shape[1]
            forced["prefix_allowed_tokens_fn"] = lambda _, row, a=answer, n=start: a[len(row) - n]
        made = model.generate(
            **{**inputs, "input_ids": ids, "attention_mask": mask, **types, **cache, **forced},
            max_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        before, cache = made.sequences, {cache_argument(model): cache_in(made)}
        mask = torch.nn.functional.pad(mask, (0, 4), value=1)
        yield before[:, ids.shape[1] :], torch.stack(made.logits, 1), before.shape[1]


# with words and with pages, over a cache that keeps all and over one with a window
@pytest.mark.parametrize(
    "family", few(FAMILIES, "qwen2_5_vl", "internvl", "unlimited_ocr"), indirect=True
)
def test_a_second_turn_on_the_same_cache(family):
    name, model, processor, inputs = family
    # with those grids transformers itself cannot place the pages of a second turn
    later = "words" if "image_grid_thw" in inputs else "pages"
    # transformers' dense logits of a padded batch are off once the window slides; and pages of
    # 1024 pixels take their time
    rows = range(1 if name in ("unlimited_ocr", "deepseek_ocr2") else 2)

    def turns(*rows):
        texts = [TEXTS[i] for i in rows]
        first = build_prompt(model, processor, [PAGES[i] for i in rows], texts)
        if later == "pages":
            return first, build_prompt(model, processor, [PAGES[i - 1] for i in rows], texts)
        ids = torch.tensor([[20, 21, 22]] * len(rows))
        return first, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    dense = list(_conversation(model, turns(*rows)))
    with paper(keep_visual=1.0, focal_layers=[1]).attach(model):
        all_visual = list(_conversation(model, turns(*rows)))
    for (tokens, logits, _), (same, close, _) in zip(dense, all_visual, strict=True):
        assert torch.equal(same, tokens)
        torch.testing.assert_close(close, logits, atol=1e-4, rtol=0)
    with paper(keep_visual=0.05, focal_layers=[1]).attach(model) as handle:
        sparse = list(_conversation(model, turns(*rows)))
        assert handle.facts()["steps"] == 6 * len(rows)
    assert not torch.allclose(sparse[1][1], dense[1][1], atol=1e-3)
    for row in rows:
        alone = turns(row)
        places = [visual_layouts(model, inputs)[0].positions.tolist() for inputs in alone]
        oracle = Oracle(places[0], 0.05, focal=[1])
        answers = [tokens[row, :, None].tolist() for tokens, _, _ in sparse]
        with _through(model, oracle):
            for number, (_, logits, length) in enumerate(_conversation(model, alone, answers)):
                torch.testing.assert_close(logits[0], sparse[number][1][row], atol=1e-5, rtol=0)
                if places[1] and name != "unlimited_ocr":  # from whose window they slide away
                    both = places[0] + [length + place for place in places[1]]
                    oracle.__init__(both, 0.05, focal=[1])


@pytest.mark.parametrize(
    "extras", [pytest.param("no sizes", marks=pytest.mark.slow), "no mask", "no image"]
)
def test_inputs_that_generate_takes_without_what_processors_add(family, extras):
    name, model, processor, _ = family
    inputs = dict(build_prompt(model, processor, PAGES[1:2], TEXTS[:1]))  # too small for crops
    left_out = {"num_local_patches", "patches_grid", "mm_token_type_ids"}
    if extras != "no sizes":
        left_out.add("attention_mask")
    if extras == "no image":
        left_out |= {"pixel_values", "image_grid_thw"}
    inputs = {key: value for key, value in inputs.items() if key not in left_out}
    tokens, logits = write(model, inputs)
    with paper(keep_visual=1.0, focal_layers=[1]).attach(model) as handle:
        same, close = write(model, inputs)
        visual = (inputs["input_ids"] == model.config.image_token_id).sum()
        assert handle.facts()["visual_tokens"] == visual > 4
    assert torch.equal(same, tokens)
    torch.testing.assert_close(close, logits, atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "knobs",
    [
        {"choose": "summaries"},
        {"choose": "signs"},
        {"periphery": 4},
        {"min_mass": 0.5, "head_reduce": "max"},
        {"dense_layers": [0]},
        {"fixation": "oracle"},
        {"fixation": "static"},
        {"fixation": "window"},
        {"fixation": "random"},
    ],
    ids=str,
)
def test_with_all_tokens_every_policy_is_dense_decoding_of_every_family(family, dense, knobs):
    name, model, processor, inputs = family
    tokens, logits = dense
    focal = {} if "choose" in knobs else {"focal_layers": [1]}
    with paper(keep_visual=1.0, min_visual=0, **focal, **knobs).attach(model) as handle:
        found_tokens, found_logits = write(model, inputs)
        assert handle.facts()["attended_by_layer"] == [1.0, 1.0]
    assert torch.equal(found_tokens, tokens)
    torch.testing.assert_close(found_logits, logits, atol=1e-4, rtol=0)


# ---- the periphery -------------------------------------------------------------------------------


def test_a_summary_for_every_token_is_dense_decoding(qwen):
    model, processor, inputs = qwen
    tokens, logits = write(model, inputs)
    most = max(len(layout.positions) for layout in visual_layouts(model, inputs))
    with paper(keep_visual=0.05, focal_layers=[1], periphery=most).attach(model) as handle:
        found_tokens, found_logits = write(model, inputs)
        attended = handle.facts()["attended_by_layer"]
    assert torch.equal(found_tokens, tokens)
    torch.testing.assert_close(found_logits, logits, atol=1e-3, rtol=0)
    assert max(attended) <= 1.0 and attended[1] == 1.0


def test_summaries_are_counted_and_bring_the_answer_nearer_to_dense(qwen):
    model, processor, inputs = qwen
    _, dense = write(model, inputs)
    sizes = [len(layout.positions) for layout in visual_layouts(model, inputs)]
    kept = sum(budget(0.05, size) for size in sizes)
    errors = {}
    for summaries in (0, 8):
        with paper(keep_visual=0.05, focal_layers=[1], periphery=summaries).attach(model) as handle:
            _, result = write(model, inputs, 2)
            facts = handle.facts()
        errors[summaries] = (result - dense[:, :2]).abs().mean().item()
        # half of the steps are each answer's first, which is dense
        share = (1 + (kept + summaries * len(sizes)) / sum(sizes)) / 2
        assert facts["attended_by_layer"][0] == pytest.approx(share)
    assert errors[8] < errors[0]


def test_fixed_fixations_read_as_many_summaries(qwen):
    model, processor, inputs = qwen
    shares = {}
    for fixation in ("dynamic", "static"):
        method = paper(keep_visual=0.05, focal_layers=[1], periphery=8, fixation=fixation)
        with method.attach(model) as handle:
            write(model, inputs, 6)
            shares[fixation] = handle.facts()["attended"]
    # a fixation may hold all of a group, whose summary is then not read
    assert abs(shares["static"] - shares["dynamic"]) < 1 / 60


def test_several_images_in_a_prompt(qwen):
    model, processor, _ = qwen
    image = "<|vision_start|><|image_pad|><|vision_end|>"

    def build(images, texts):
        return processor(
            images=images, text=texts, padding=True, padding_side="left", return_tensors="pt"
        )

    both, one = f"{image}and{image}", f"read {image}"
    inputs = build([PAGES[0], PAGES[1], PAGES[2]], [both, one])
    with paper(keep_visual=0.1, focal_layers=[1]).attach(model):
        result = write(model, inputs)
    rows = [build(PAGES[:2], [both]), build(PAGES[2:], [one])]
    _check(model, rows, result, keep=0.1, focal=[1])


def test_dilation_stays_inside_the_budget_and_chooses_otherwise(qwen):
    model, _, inputs = qwen
    seen = []
    for dilate in (0, 1):
        with paper(keep_visual=0.1, focal_layers=[1], dilate=dilate).attach(model) as handle:
            logits = write(model, inputs)[1]
            seen.append((handle.facts()["attended_by_layer"], logits))
    assert seen[0][0] == seen[1][0]
    assert not torch.allclose(seen[0][1], seen[1][1])


def test_prompts_without_an_image(qwen):
    model, processor, _ = qwen
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    for texts in (["abc", "defgh"], ["abc", f"read {image}"]):
        images = PAGES[:1] if image in texts[1] else None
        inputs = processor(
            images=images, text=texts, padding=True, padding_side="left", return_tensors="pt"
        )
        tokens, logits = write(model, inputs)
        for focal in ([1], "auto"):
            with paper(keep_visual=0.1, focal_layers=focal, warmup=2).attach(model) as handle:
                result = write(model, inputs)
                assert bool(handle.facts()["steps"]) is bool(images)
            torch.testing.assert_close(result[1][:1], logits[:1], atol=1e-5, rtol=0)


def test_a_conversation_without_an_image_is_dense(intern):
    model = intern[0]
    first, second = torch.tensor([[20, 21, 22]]), torch.tensor([[23, 24]])
    with paper(focal_layers=[1]).attach(model), torch.no_grad():
        cache = cache_in(model(input_ids=first, use_cache=True))
        result = model(input_ids=second, **{cache_argument(model): cache}).logits
    with torch.no_grad():
        expected = model(input_ids=torch.cat([first, second], 1)).logits[:, -2:]
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


def test_sampling_and_several_answers_of_a_prompt(qwen):
    model, processor, _ = qwen
    inputs = build_prompt(model, processor, PAGES[:2], TEXTS[:2])

    def sample():
        torch.manual_seed(3)
        return model.generate(
            **inputs, max_new_tokens=5, do_sample=True, num_return_sequences=2, top_k=5
        )

    dense = sample()
    with paper(keep_visual=1.0, focal_layers=[1]).attach(model) as handle:
        assert torch.equal(sample(), dense)
        assert handle.facts()["steps"] == 4 * 4


def _read(model, inputs):
    """The prompt's cache."""
    places = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return cache_in(model(**inputs, position_ids=places, use_cache=True))


def _step(model, inputs, cache, tokens, step):
    """Logits after the token of that step, ``(batch, vocabulary)``."""
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, step + 1), value=1)
    with torch.no_grad():
        return model(
            input_ids=tokens[:, step : step + 1],
            attention_mask=mask,
            position_ids=mask.sum(1, keepdim=True) - 1,
            **{cache_argument(model): cache},
        ).logits[:, -1]


def test_a_decoding_loop_of_calls_and_counts_of_single_steps(intern):
    model, _, inputs = intern
    tokens, logits = write(model, inputs)
    with paper(keep_visual=1.0, focal_layers=[1]).attach(model):
        cache = _read(model, inputs)
        for step in range(4):
            result = _step(model, inputs, cache, tokens, step)
            torch.testing.assert_close(result, logits[:, step], atol=1e-4, rtol=0)
    sizes = [len(layout.positions) for layout in visual_layouts(model, inputs)]
    kept = sum(budget(0.1, size) for size in sizes) / sum(sizes)
    with paper(keep_visual=0.1, focal_layers=[1]).attach(model) as handle:
        cache = _read(model, inputs)
        assert handle.facts()["attended"] is None
        for step in range(3):
            handle.reset()
            _step(model, inputs, cache, tokens, step)
            share = kept if step else 1.0
            expected = [share, 1.0, share, share]
            assert handle.facts()["attended_by_layer"] == pytest.approx(expected)


def test_prompts_of_one_model_are_decoded_in_turns(intern):
    model, _, inputs = intern
    with paper(keep_visual=0.1, focal_layers=[1]).attach(model):
        tokens, logits = write(model, inputs, 3)
        caches = [_read(model, inputs), _read(model, inputs)]
        for step in range(3):
            for cache in caches:
                result = _step(model, inputs, cache, tokens, step)
                torch.testing.assert_close(result, logits[:, step], atol=1e-5, rtol=0)


def test_a_state_ends_with_its_cache(qwen):
    model, _, inputs = qwen
    with paper(focal_layers=[1]).attach(model) as handle, torch.no_grad():
        out = model(**inputs, use_cache=True)
        assert len(handle.states) == 1
        model(**inputs, use_cache=False)  # scoring leaves no request behind
        del out
        gc.collect()
        assert len(handle.states) == 0


def test_half_precision(qwen):
    _, processor, inputs = qwen
    model, _ = fastocr.model("qwen2_5_vl", layers=4)
    model = model.to(torch.bfloat16)
    tokens, logits = write(model, inputs, 1)
    with paper(keep_visual=1.0, focal_layers=[1]).attach(model):
        _, result = write(model, inputs, 1)
    torch.testing.assert_close(result, logits, atol=3e-2 * logits.abs().max().item(), rtol=0)


# ---- focal layers that the method finds itself ---------------------------------------------------


def test_auto_chooses_the_layers_that_calibration_chooses_page_by_page(qwen):
    model, processor, inputs = qwen
    calibrations = [
        calibrate(paper(keep_visual=0.1, focal_by="recall"), model, [page], 4)  # 3 steps
        for page in _alone(model, processor)
    ]
    with paper(keep_visual=0.1, warmup=3).attach(model) as handle:
        held = DynamicCache(config=text_model(model).config)
        result = write(model, inputs, 6, **{cache_argument(model): held})
        [state] = handle.states.values()
        assert state.policy.focal == [list(of_page.focal_layers) for of_page in calibrations]
        facts = handle.facts()
    dense = write(model, inputs, 6)
    torch.testing.assert_close(result[1][:, :3], dense[1][:, :3], atol=1e-5, rtol=0)
    assert not torch.allclose(result[1][:, 3], dense[1][:, 3], atol=1e-4)
    assert facts["attended"] < 0.9


@pytest.mark.parametrize(
    "knobs",
    [
        pytest.param({"focal_layers": "auto"}, marks=pytest.mark.slow),
        {"focal_layers": "auto", "min_mass": 0.1, "periphery": 4},
        pytest.param({"focal_layers": "auto", "reuse": False}, marks=pytest.mark.slow),
        {"focal_layers": "auto", "dense_layers": "auto", "min_fixation": 9},
        pytest.param({"focal_layers": "auto", "fixation": "static"}, marks=pytest.mark.slow),
        pytest.param({"focal_layers": [1], "min_visual": 100}, marks=pytest.mark.slow),
        pytest.param({"choose": "summaries", "min_visual": 0}, marks=pytest.mark.slow),
        {"choose": "signs", "min_visual": 0},
        {"focal_layers": "auto", "min_visual": 100, "fixation": "window"},
    ],
    ids=str,
)
def test_an_answer_does_not_depend_on_its_batch(knobs):
    model, processor = fastocr.model("qwen2_5_vl", layers=14)  # of which two are focal
    inputs = build_prompt(model, processor, PAGES, TEXTS)
    if "choose" not in knobs:
        knobs = {"warmup": 2, **knobs}
    method = paper(keep_visual=0.05, **knobs)
    with method.attach(model) as handle:
        tokens, logits = write(model, inputs, 4)
        together = handle.facts()
        handle.reset()
        for row, page in enumerate(_alone(model, processor)):
            alone, alone_logits = write(model, page, 4)
            assert torch.equal(alone[0], tokens[row])
            torch.testing.assert_close(alone_logits[0], logits[row], atol=1e-5, rtol=0)
        for name, fact in handle.facts().items():
            assert together[name] == pytest.approx(fact)


def test_calibration_on_a_model(qwen):
    model, processor, inputs = qwen
    method = paper(keep_visual=0.1, focal_by="recall")
    once = calibrate(method, model, [inputs], max_new_tokens=5)
    assert once.steps == 4 * len(PAGES) and once.focal_layers == once.order[:1]
    recall = torch.tensor(once.recall)
    # a layer's own choice keeps most of its attention
    assert (recall.diagonal() >= recall - 1e-6).all()
    assert list(once.curve) == sorted(once.curve) and once.curve[-1] == pytest.approx(1)
    # page by page is the same mean
    apart = calibrate(method, model, _alone(model, processor), max_new_tokens=5)
    torch.testing.assert_close(torch.tensor(apart.recall), recall, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        torch.tensor(apart.previous), torch.tensor(once.previous), atol=1e-5, rtol=0
    )
    everything = calibrate(paper(keep_visual=1.0), model, [inputs], max_new_tokens=3)
    torch.testing.assert_close(torch.tensor(everything.recall), torch.ones(4, 4))
    json.dumps(asdict(once))
    paper(focal_layers=once.focal_layers)


@pytest.mark.parametrize(
    "knobs, oracle",
    [
        ({"dense_layers": [0], "min_fixation": 9}, {"dense": [0], "least": 9}),
        ({"dense_layers": [3], "head_reduce": "max"}, {"dense": [3], "head_reduce": "max"}),
        ({"fixation": "oracle", "min_fixation": 9}, {"fixed": "oracle", "least": 9}),
    ],
    ids=str,
)
def test_dense_layers_the_floor_and_the_bound(qwen, knobs, oracle):
    model, processor, inputs = qwen
    with paper(keep_visual=0.05, focal_layers=[1], **knobs).attach(model) as handle:
        result = write(model, inputs, 4)
        facts = handle.facts()
    oracles = _check(model, _alone(model, processor), result, keep=0.05, **{"focal": [1]} | oracle)
    offered = sum(len(oracle.positions) for oracle in oracles) * 4
    attended = [sum(sum(oracle.attended[layer::4]) for oracle in oracles) for layer in range(4)]
    assert facts["attended_by_layer"] == [number / offered for number in attended]


@pytest.mark.parametrize(
    "knobs",
    [
        {"min_fixation": 10_000, "keep_visual": 0.05},
        {"dense_layers": [2], "head_reduce": "max", "min_mass": 0.5},
        {"dense_layers": "auto", "focal_layers": "auto", "warmup": 2, "periphery": 4},
        {"fixation": "oracle"},
        {"fixation": "static", "dense_layers": [0], "focal_layers": [0]},
    ],
    ids=str,
)
def test_with_all_tokens_every_policy_is_dense_decoding(qwen, knobs):
    model, _, inputs = qwen
    tokens, logits = write(model, inputs, 4)
    with paper(**{"keep_visual": 1.0, "focal_layers": [1]} | knobs).attach(model) as handle:
        found = write(model, inputs, 4)
        assert handle.facts()["attended"] == 1
    assert torch.equal(found[0], tokens)
    torch.testing.assert_close(found[1], logits, atol=1e-4, rtol=0)


def test_calibration_finds_dense_layers_and_focal_ones_by_loss(qwen):
    model, _, inputs = qwen
    focus = calibrate(paper(keep_visual=0.1, focal_by="recall"), model, [inputs], 4).focus
    least = sorted(focus)[1] + 1e-6  # so that two of four are below
    method = FastOCR(keep_visual=0.1, min_fixation=0, min_focus=least)
    found = calibrate(method, model, [inputs], 4)
    assert found.dense_layers == tuple(n for n in range(4) if focus[n] < least)
    [tried] = found.losses  # one round, of the two others
    assert [n for n in range(4) if tried[n] is None] == list(found.dense_layers)
    best = min((loss, n) for n, loss in enumerate(tried) if loss is not None)
    assert found.focal_layers == (best[1],) and found.loss == best[0]
    assert [found.attended_by_layer[n] for n in (*found.dense_layers, best[1])] == [1, 1, 1]
    # the loss is that of the dense model's answer, token by token
    tokens, _ = write(model, inputs, 3)
    settings = {"focal_layers": found.focal_layers, "dense_layers": found.dense_layers}
    length = inputs["input_ids"].shape[1]

    def forced(row, ids):
        return [tokens[row, len(ids) - length].item()]

    with method.model_copy(update=settings).attach(model):
        _, logits = write(model, inputs, 3, prefix_allowed_tokens_fn=forced)
    expected = -logits.log_softmax(-1).gather(2, tokens[:, 1:, None]).mean().item()
    assert found.loss == pytest.approx(expected, rel=1e-5)
    assert calibrate(method.model_copy(update=settings), model, [inputs], 4).focal_by is None


def test_calibration_stops_counting_at_the_end_of_an_answer(qwen):
    model, _, inputs = qwen
    answers = write(model, inputs, 5)[0]
    end = int(answers[0, 3])
    expected = sum(
        row.index(end) if end in row else len(row) - 1 for row in answers[:, :6].tolist()
    )
    model.generation_config.eos_token_id = [end]
    try:
        counted = calibrate(paper(), model, [inputs], max_new_tokens=6).steps
    finally:
        model.generation_config.eos_token_id = None
    assert counted == expected


# ---- side by side --------------------------------------------------------------------------------


def test_two_threads_with_two_models_give_each_its_own_output():
    jobs = []
    for family, knobs in (
        ("qwen2_5_vl", {"keep_visual": 0.05, "focal_layers": [1]}),
        ("qwen2_5_vl", {"keep_visual": 0.4, "focal_layers": [0], "min_mass": 0.3}),
        ("glm_ocr", {"keep_visual": 0.1, "focal_layers": [0]}),
    ):
        model, processor = fastocr.model(family)
        jobs.append((model, build_prompt(model, processor, PAGES, TEXTS), paper(**knobs)))

    def run(model, inputs, method):
        with method.attach(model) as handle:
            return *write(model, inputs, 8), handle.facts()

    solo = [run(*job) for job in jobs]
    together = [None] * len(jobs)
    barrier = threading.Barrier(len(jobs))

    def work(number):
        barrier.wait()
        together[number] = run(*jobs[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine, alone in zip(together, solo, strict=True):
        assert torch.equal(mine[0], alone[0]) and torch.equal(mine[1], alone[1])
        assert mine[2] == alone[2]


# ---- another method that shortens the prompt -----------------------------------------------------


class Shortener:
    """Drops every third visual token of each page: what a prompt-pruning method does."""

    name = "shortener"

    def __init__(self, announce=True):
        self.announce = announce

    @contextmanager
    def attach(self, model):
        state = {}

        def note(module, args, kwargs):
            if kwargs["input_ids"].shape[1] > 1:
                state["ids"] = kwargs["input_ids"]

        def shorten(module, args, kwargs):
            embeds, mask = kwargs["inputs_embeds"], kwargs["attention_mask"]
            if embeds.shape[1] == 1:
                seen = torch.ones(len(mask), mask.shape[1] - state["length"], dtype=mask.dtype)
                kwargs["attention_mask"] = torch.cat([state["mask"], seen], 1)
                return args, kwargs
            kept = []
            for ids in state["ids"] == model.config.image_token_id:
                visual = ids.nonzero()[:, 0]
                gone = set(visual[::3].tolist())
                kept.append([i for i in range(len(ids)) if i not in gone])
            longest = max(map(len, kept))
            index = torch.tensor([[-1] * (longest - len(row)) + row for row in kept])
            there, index_ = index >= 0, index.clamp(min=0)
            state["length"], state["mask"] = mask.shape[1], mask.gather(1, index_) * there
            kwargs["inputs_embeds"] = embeds.gather(
                1, index_[..., None].expand(-1, -1, embeds.shape[2])
            )
            kwargs["attention_mask"] = state["mask"]
            kwargs["position_ids"] = kwargs["position_ids"].expand(len(mask), -1).gather(1, index_)
            if self.announce:
                before = kwargs.get(VISUAL_LAYOUTS) or state["layouts"]
                kwargs[VISUAL_LAYOUTS] = [
                    layout.of_kept(row) for layout, row in zip(before, index, strict=True)
                ]
            return args, kwargs

        state["layouts"] = self.layouts
        hooks = [
            model.base_model.register_forward_pre_hook(note, with_kwargs=True),
            text_model(model).register_forward_pre_hook(shorten, with_kwargs=True),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


@pytest.mark.parametrize("order", ["shortener outside", "fastocr outside"])
def test_stacks_with_a_method_that_shortens_the_prompt(order):
    model, processor = fastocr.model("deepseek_ocr")
    inputs = build_prompt(model, processor, PAGES, TEXTS)
    shortener = Shortener()
    shortener.layouts = visual_layouts(model, inputs)
    with shortener.attach(model):
        tokens, logits = write(model, inputs)
    dense_tokens, dense = write(model, inputs)
    assert not torch.allclose(logits, dense, atol=1e-3)
    for keep in (1.0, 0.1):
        methods = [shortener, paper(keep_visual=keep, focal_layers=[1])]
        if order == "fastocr outside":
            methods.reverse()
        with methods[0].attach(model) as outer, methods[1].attach(model) as inner:
            found_tokens, result = write(model, inputs)
            facts = (outer or inner).facts()
        sizes = [len(x.positions) - -(-len(x.positions) // 3) for x in shortener.layouts]
        assert facts["visual_tokens"] == sum(sizes) / len(sizes)
        if keep == 1:
            assert torch.equal(found_tokens, tokens)
            torch.testing.assert_close(result, logits, atol=1e-4, rtol=0)
            assert facts["attended_by_layer"] == [1.0, 1.0]
        else:
            kept = sum(budget(0.1, size) for size in sizes) / sum(sizes)
            assert facts["attended_by_layer"] == pytest.approx([(1 + 3 * kept) / 4, 1.0])


def test_a_shortened_prompt_that_is_not_announced_is_refused():
    model, processor = fastocr.model("deepseek_ocr")
    inputs = build_prompt(model, processor, PAGES, TEXTS)
    shortener = Shortener(announce=False)
    shortener.layouts = visual_layouts(model, inputs)
    with shortener.attach(model), paper(focal_layers=[1]).attach(model):
        with pytest.raises(ValueError, match="FastOCR expects the .*visual_layouts"):
            write(model, inputs)


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"num_beams": 2}, "got beam_search"),
        ({"num_beams": 2, "do_sample": True}, "got beam_sample"),
        ({"prompt_lookup_num_tokens": 2}, "got assisted_generation"),
        ({"use_cache": False}, "got use_cache=False"),
        ({"prefill_chunk_size": 8}, "FastOCR reads a prompt in one call.*prefill_chunk_size=8"),
    ],
    ids=["beams", "sampled beams", "assisted", "no cache", "chunks"],
)
def test_modes_that_move_the_cache_are_refused(qwen, settings, words):
    model, _, inputs = qwen
    with paper(focal_layers=[1]).attach(model), pytest.raises(ValueError, match=words):
        model.generate(**inputs, max_new_tokens=2, **settings)


def test_a_cache_that_did_not_grow_here_is_refused(qwen):
    model, _, inputs = qwen
    one = {"input_ids": torch.tensor([[20]] * 3)}
    with torch.no_grad():
        old = cache_in(model(**inputs, use_cache=True))
        with paper(focal_layers=[1]).attach(model):
            with pytest.raises(ValueError, match="FastOCR expects a cache with the 0 tokens"):
                model(**one, **{cache_argument(model): old})
            cache = cache_in(model(**inputs, use_cache=True))
            model(**one, **{cache_argument(model): cache})
            with pytest.raises(ValueError, match="FastOCR goes on with all 3 sequences.*got 1"):
                model(input_ids=torch.tensor([[20]]), **{cache_argument(model): cache})
            cache.crop(-1)
            with pytest.raises(ValueError, match="assisted decoding"):
                model(**one, **{cache_argument(model): cache})
            with pytest.raises(ValueError, match="FastOCR expects a call.* with input_ids"):
                embeds = model.get_input_embeddings()(inputs["input_ids"])
                model(inputs_embeds=embeds, use_cache=True)


def test_the_same_method_twice_is_refused(qwen):
    model, _, _ = qwen
    with paper(focal_layers=[1]).attach(model):
        with pytest.raises(ValueError, match="already"), paper().attach(model):
            pass
    with paper(focal_layers=[1]).attach(model):
        pass


@pytest.mark.parametrize(
    "knobs, words",
    [
        ({"keep_visual": 0}, "greater than 0"),
        ({"keep_visual": 1.1}, "less than or equal to 1"),
        ({"focal_layers": []}, "at least 1"),
        ({"focal_layers": [-1]}, "greater than or equal to 0"),
        ({"min_mass": 1}, "less than 1"),
        ({"warmup": 1}, "greater than or equal to 2"),
        ({"keep": 0.5}, "keep"),
        ({"fixation": "static", "reuse": False}, "belong to the dynamic fixation"),
        ({"choose": "summaries", "periphery": 0}, "needs summaries to read; got periphery=0"),
        ({"choose": "summaries", "focal_layers": [1]}, "focal_layers belongs to choose: focal"),
        ({"choose": "summaries", "fixation": "window"}, "fixation belongs to choose: focal"),
        ({"periphery": "auto"}, "auto belongs to choose: summ"),
    ],
    ids=str,
)
def test_impossible_knobs(knobs, words):
    with pytest.raises(ValueError, match=words):
        paper(**knobs)


def test_a_fixed_fixation_needs_to_know_the_dense_layers(qwen):
    model, _, inputs = qwen
    with FastOCR(fixation="static", min_visual=0).attach(model):
        with pytest.raises(ValueError, match="got dense_layers='auto'; give them, or calibrate"):
            write(model, inputs, 2)
    write(model, inputs, 2)


def test_a_focal_layer_that_the_model_does_not_have(qwen):
    with pytest.raises(ValueError, match=r"model's 4, counted from 0; got \[1, 4\]"):
        paper(focal_layers=[1, 4]).attach(qwen[0])
    with pytest.raises(ValueError, match=r"dense_layers .* model's 4, .* got \[4\]"):
        paper(dense_layers=[4]).attach(qwen[0])
    with pytest.raises(ValueError, match="at least two decode steps; got 0"):
        calibrate(paper(), qwen[0], [])


# ---- families without an adapter ---------------------------------------------------------------


def _qwen2_vl():
    """A family without adapter; its processor is Qwen2.5-VL's."""
    known, processor = fastocr.model("qwen2_5_vl")
    config = known.config.to_dict()
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config={**config["text_config"], "model_type": "qwen2_vl_text"},
            vision_config={
                "depth": 1,
                "embed_dim": 16,
                "hidden_size": 32,
                "num_heads": 2,
                "mlp_ratio": 2,
                "patch_size": 8,
            },
            **{name: value for name, value in config.items() if name.endswith("token_id")},
        )
    )
    return fastocr.fill(model), build_prompt(known, processor, PAGES, TEXTS)


def test_preflight_passes_a_family_without_an_adapter():
    model, inputs = _qwen2_vl()
    with pytest.raises(ValueError, match="no adapter"):
        visual_layouts(model, inputs)
    preflight(model, inputs)
    with paper(keep_visual=0.1, focal_layers=[1]).attach(model) as handle:
        write(model, inputs)
        assert handle.facts()["attended"] < 0.8


def _ignoring_keywords(model, layer):
    """A layer that keeps what it is given from the attention function."""
    module = decoder(model).layers[layer].self_attn
    forward = type(module).forward

    def forward_without_keywords(self, hidden_states, **kwargs):
        kwargs.pop(STATE, None)
        return forward(self, hidden_states, **kwargs)

    module.forward = forward_without_keywords.__get__(module)


@contextmanager
def _counted(model):
    """Tokens that the text model reads, call by call."""
    lengths = []
    hook = decoder(model).register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]),
        with_kwargs=True,
    )
    try:
        yield lengths
    finally:
        hook.remove()


@pytest.mark.parametrize("cache", [None, "static"])
def test_the_preflight_of_a_family_runs_once(cache):
    model, inputs = _qwen2_vl()
    settings = {} if cache is None else {"cache_implementation": cache}

    def sample():
        torch.manual_seed(3)
        return model.generate(**inputs, max_new_tokens=4, do_sample=True, top_k=5, **settings)

    dense = sample()
    length = inputs["input_ids"].shape[1]

    def implementations():
        return [layer.self_attn.config._attn_implementation for layer in decoder(model).layers]

    names = implementations()
    with paper(keep_visual=1.0, focal_layers=[1]).attach(model) as handle:
        with _counted(model) as lengths:
            assert torch.equal(sample(), dense)  # nothing is drawn from the random generator
            # a dense and a full answer of two steps each, then the caller's
            assert lengths == [length, 1, 1] * 2 + [length, 1, 1, 1]
            assert handle.facts()["steps"] == 3 * len(PAGES) and len(handle.states) <= 1
            assert torch.equal(sample(), dense)
            assert lengths[10:] == [length, 1, 1, 1]
    assert implementations() == names
    assert "generate" not in vars(model) and torch.equal(sample(), dense)


def test_a_family_that_fails_its_preflight_is_refused_by_its_first_answer():
    model, inputs = _qwen2_vl()
    _ignoring_keywords(model, 1)
    before = write(model, inputs)
    words = {"input_ids": torch.tensor([[20, 21, 22]])}
    with paper(keep_visual=0.1, focal_layers=[0]).attach(model):
        model.generate(**words, max_new_tokens=2)  # no image: nothing is chosen from
        for _ in range(2):
            with pytest.raises(ValueError, match="layers 1 do not call transformers' attention"):
                write(model, inputs)
        model.generate(**words, max_new_tokens=2)
    after = write(model, inputs)
    assert torch.equal(after[0], before[0]) and torch.equal(after[1], before[1])


def test_a_checkpoint_of_a_family_without_an_adapter_is_loaded(tmp_path):
    model, inputs = _qwen2_vl()
    _, processor = fastocr.model("qwen2_5_vl")
    dense = write(model, inputs)[1]
    method = paper(keep_visual=0.1, focal_layers=[1], min_visual=0)
    with compress.apply(model, method) as applied:
        expected = write(model, inputs)
        applied.save(tmp_path / "runtime", processor)
    loaded = compress.load(tmp_path / "runtime").model
    assert type(loaded) is Qwen2VLForConditionalGeneration
    loaded.generation_config.eos_token_id = None
    result = write(loaded, inputs)
    assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])
    assert not torch.allclose(result[1], dense)
    # whoever has no prompt for it says so before the weights are read
    with pytest.raises(ValueError, match="unknown architecture .model_type='qwen2_vl'"):
        load_runtime(locate(tmp_path / "runtime"))
    config = json.loads((tmp_path / "runtime" / "config.json").read_text())
    (tmp_path / "runtime" / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(ValueError, match="unknown architecture .model_type='llama'"):
        load_vlm(tmp_path / "runtime", adapter=False)


def test_calls_of_the_model_are_refused_before_the_preflight():
    model, inputs = _qwen2_vl()
    with paper(focal_layers=[1]).attach(model) as handle, torch.no_grad():
        with pytest.raises(ValueError, match="FastOCR has no adapter.*generate once before a loop"):
            model(**inputs, use_cache=True)
        model.generate(**inputs, max_new_tokens=1)
        read = model(**inputs, use_cache=True)
        assert list(handle.states) == [cache_in(read)]


def test_preflight_names_what_is_missing():
    model, inputs = _qwen2_vl()
    with pytest.raises(ValueError, match="input_ids has no image token"):
        preflight(model, {"input_ids": torch.tensor([[20, 21, 22]])})
    _ignoring_keywords(model, 1)
    with pytest.raises(ValueError, match="layers 1 do not call transformers' attention interface"):
        preflight(model, inputs)

    module = decoder(model).layers[1].self_attn
    forward = type(module).forward

    def odd(self, hidden_states, **kwargs):  # as if it scaled its logits behind the interface
        self.scaling = 1.0 if STATE in kwargs else 0.25
        return forward(self, hidden_states, **kwargs)

    module.forward = odd.__get__(module)
    with pytest.raises(ValueError, match="logits differ from dense ones by"):
        preflight(model, inputs)


def test_models_that_cannot_be_served_are_refused_with_what_they_lack():
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=32,
    )
    llama = LlamaForCausalLM(config)
    with pytest.raises(ValueError, match="'llama' lacks an image_token_id"):
        paper().attach(llama)
    model, _ = _qwen2_vl()
    model.model.language_model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match="keeps the prompt in all layers.*sliding_attention"):
        paper().attach(model)
