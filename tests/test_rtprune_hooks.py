"""RTPrune on running models, against a slow oracle: page by page, no cache, explicit masks."""

import copy
import inspect
import warnings
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    Qwen2_5_VLConfig,
    StaticCache,
)
from transformers.masking_utils import flash_attention_mask
from transformers.modeling_flash_attention_utils import (
    _is_packed_sequence,
    prepare_fa_kwargs_from_position_ids,
)

from builders import ocr
from builders.counting import Counted
from builders.fastocr import paper
from builders.tiers import few
from compress.checkpoints.applied import Applied
from compress.methods.rtprune import RTPrune
from compress.methods.rtprune.encoder_attention import EncoderRecorder
from compress.methods.rtprune.pages import EncodedPage, prune_pages
from compress.methods.rtprune.ratio import distinctness, keep_fraction, textual_density
from compress.methods.rtprune.transport import merge, similarity, transport_plans
from compress.models.cache_argument import cache_argument, cache_in
from compress.models.deepseek_ocr_views import view_tokens
from compress.models.visual import VISUAL_LAYOUTS, text_model, visual_layouts

STEPS = 7
SELECTIONS = inspect.get_annotations(RTPrune)["select"].__args__
NO_STOP = {"max_new_tokens": STEPS, "min_new_tokens": STEPS}
LOGITS = {"return_dict_in_generate": True, "output_logits": True, **NO_STOP}


@pytest.fixture(scope="module")
def deepseek():
    return ocr.deepseek_ocr()


@pytest.fixture(scope="module")
def prompt():
    """Two pages, one with crops; padded on the left."""
    pages = [ocr.page(300, 200, 0, 0.6), ocr.page(128, 128, 1, 0.3)]
    return ocr.deepseek_prompt(pages, ["read all of it", "a"])


@pytest.fixture(scope="module")
def second():
    return ocr.deepseek_ocr2()


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def _first(prompt):
    """Its first page alone, to which all the crops belong."""
    return {k: v if k == "pixel_values_local" else v[:1] for k, v in prompt.items()}


# ---- the oracle --------------------------------------------------------------------------------


def _embeddings(model, inputs):
    """What the decoder would be given, ``(batch, length, dim)``."""
    seen = []
    hook = text_model(model).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**inputs)
    hook.remove()
    return seen[0]


def _shortened(model, inputs, keep_tokens, density):
    """Embeddings and position ids of each prompt after RTPrune, token by token."""
    prompts = []
    rows = zip(_embeddings(model, inputs), visual_layouts(model, inputs), strict=True)
    for row, (embeds, layout) in enumerate(rows):
        embeds = embeds.clone()
        padding = int((inputs["attention_mask"][row] == 0).sum())
        gone = set(range(padding))
        for image in set(layout.image_of.tolist()):
            tokens = [t for t, i in enumerate(layout.image_of.tolist()) if i == image]
            grid = [t for t in tokens if layout.grid[t, 2] >= 0]
            where = layout.positions[grid]
            x = embeds[where]
            fraction = keep_tokens
            if keep_tokens == "dynamic":
                fraction = keep_fraction(density.pop(0), distinctness(x)).item()
            keep = max(1, int(len(grid) * fraction))
            norms = x.norm(dim=1).tolist()
            best = sorted(sorted(range(len(grid)), key=lambda i: (-norms[i], i))[:keep])
            rest = [i for i in range(len(grid)) if i not in best]
            if rest:
                [plan] = transport_plans(similarity(x[best], x[rest])[None])
                embeds[where[best]] = merge(x[best], x[rest], plan)
            gone |= {int(where[i]) for i in rest}
            after_newline = False
            for t in tokens:
                position = int(layout.positions[t])
                newline = layout.grid[t, 2] < 0 and layout.grid[t, 1] >= 0
                if position not in gone:
                    if newline and after_newline:
                        gone.add(position)
                    after_newline = newline
        left = [position for position in range(len(embeds)) if position not in gone]
        prompts.append((embeds[left], torch.tensor(left) - padding))
    return prompts


def _logits(model, prompt, answer, window=None):
    """Of the tokens of ``answer``, read without a cache behind a prompt that is all attended."""
    decoder = text_model(model)
    embeds, positions = prompt
    behind = positions[-1] + 1 + torch.arange(len(answer) - 1)
    embeds = torch.cat([embeds, decoder.embed_tokens(answer[:-1])])[None]
    length, start = embeds.shape[1], len(positions)
    query, key = torch.arange(length)[:, None], torch.arange(length)
    mask = key <= query
    if window is not None:
        mask &= (key < start) | (query - key < window)
    hidden = decoder(
        inputs_embeds=embeds,
        attention_mask=mask[None, None],
        position_ids=torch.cat([positions, behind])[None],
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden[0, start - 1 :])


@contextmanager
def _decoding_by(model, implementation):
    """The decoder's attention by another function; see the README."""
    before = text_model(model).config._attn_implementation
    model.set_attn_implementation({"text_config": implementation})
    try:
        yield
    finally:
        model.set_attn_implementation({"text_config": before})


def _check_against_oracle(
    model, inputs, keep_tokens, window=None, implementation="sdpa", **settings
):
    density = [textual_density(page[None], (4, 4))[0] for page in inputs["pixel_values"]]
    prompts = _shortened(model, inputs, keep_tokens, density)
    with _decoding_by(model, implementation), RTPrune(keep_tokens=keep_tokens).attach(model):
        made = model.generate(**inputs, **LOGITS, do_sample=False, **settings)
    answers = made.sequences[:, inputs["input_ids"].shape[1] :]
    assert answers.shape[1] == STEPS
    logits = torch.stack(made.logits, 1)
    for row, prompt in enumerate(prompts):
        assert len(prompt[1]) < inputs["attention_mask"][row].sum()
        expected = _logits(model, prompt, answers[row], window)
        torch.testing.assert_close(logits[row], expected, atol=2e-4, rtol=1e-4)


# ---- generation --------------------------------------------------------------------------------


@pytest.mark.parametrize(("keep_tokens", "implementation"), [(0.5, "sdpa"), ("dynamic", "eager")])
def test_deepseek_ocr_generates_as_the_oracle(deepseek, prompt, keep_tokens, implementation):
    _check_against_oracle(deepseek, prompt, keep_tokens, implementation=implementation)


def _flash_like(calls):
    """What flash attention does with its mask and position ids, on the CPU.

    As transformers' ``_flash_attention_forward``: a 2-D mask unpads; without one, position ids that
    do not ascend cut a batch of one into sequences that do not see each other.
    """

    def attention(module, query, key, value, mask, scaling=None, dropout=0.0, **others):
        new, stored = query.shape[2], key.shape[2]
        allowed = torch.ones(new, stored, dtype=torch.bool).tril(stored - new)
        ids = others.get("position_ids")
        if mask is not None:
            assert mask.ndim == 2
            allowed = allowed & mask.bool()[:, None, None, -stored:]
            calls.append("padded")
        elif _is_packed_sequence(ids, len(query)):
            (starts, _), _ = prepare_fa_kwargs_from_position_ids(ids)
            sequence = torch.bucketize(torch.arange(new), starts[1:], right=True)
            allowed = allowed & (sequence[:, None] == sequence)
            calls.append(f"{len(starts) - 1} packed")
        else:
            calls.append("whole")
        group = query.shape[1] // key.shape[1]
        logits = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling
        weights = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min).softmax(-1)
        return (weights @ value.repeat_interleave(group, 1)).transpose(1, 2), None

    AttentionInterface.register("flash_like", attention)
    AttentionMaskInterface.register("flash_like", flash_attention_mask)


@pytest.mark.parametrize(
    ("family", "pages"),
    few(
        [("deepseek_ocr", 1), ("deepseek_ocr", 2), ("unlimited_ocr", 1), ("deepseek_ocr2", 2)],
        *(("deepseek_ocr", 1), ("deepseek_ocr", 2)),
    ),
)
def test_flash_attention_takes_kept_position_ids_for_one_sequence(prompt, family, pages):
    """They have gaps; and a padded batch goes by the 2-D mask."""
    window = 3 if family == "unlimited_ocr" else None
    model = getattr(ocr, family)(*([window] if window else []))
    inputs = prompt if pages == 2 else _first(prompt)
    if family == "deepseek_ocr2":
        inputs = ocr.deepseek2_prompt(["read", "a"][:pages])
    calls = []
    _flash_like(calls)
    _check_against_oracle(model, inputs, 0.5, window, implementation="flash_like")
    # the prompt of one page, whose ids have gaps, and the steps behind it
    assert set(calls) == ({"padded"} if pages == 2 else {"1 packed", "whole"})


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_unlimited_ocr_slides_over_the_answer_only(prompt, cache):
    model = ocr.unlimited_ocr(window=3)
    assert STEPS > 3
    _check_against_oracle(model, prompt, 0.5, window=3, cache_implementation=cache)


def test_deepseek_ocr2_generates_as_the_oracle(second):
    _check_against_oracle(second, ocr.deepseek2_prompt(["read", "a"]), 0.3)


def test_several_pages_of_a_prompt_are_pruned_one_by_one(deepseek, prompt):
    ids = prompt["input_ids"]
    first, other = (
        row[mask.bool()] for row, mask in zip(ids, prompt["attention_mask"], strict=True)
    )
    both = {**prompt, "input_ids": torch.cat([first, other])[None]}
    both["attention_mask"] = torch.ones_like(both["input_ids"])
    _check_against_oracle(deepseek, both, 0.5)


def test_a_static_cache_is_as_good(deepseek, prompt):
    _check_against_oracle(deepseek, prompt, 0.5, cache_implementation="static")


def test_without_a_cache_it_prunes_at_every_step(deepseek, prompt):
    _check_against_oracle(deepseek, prompt, 0.5, use_cache=False)


def test_beams_share_a_pruned_page(deepseek, prompt):
    prompts = _shortened(deepseek, prompt, 0.5, [])
    with RTPrune(keep_tokens=0.5).attach(deepseek) as handle:
        made = deepseek.generate(
            **prompt, **NO_STOP, num_beams=3, do_sample=False, return_dict_in_generate=True,
            output_scores=True,
        )  # fmt: skip
        assert len(handle.pages) == 2
    answers = made.sequences[:, prompt["input_ids"].shape[1] :]
    for score, answer, left in zip(made.sequences_scores, answers, prompts, strict=True):
        logits = _logits(deepseek, left, answer)
        chosen = logits.log_softmax(-1).gather(1, answer[:, None])
        torch.testing.assert_close(score, chosen.sum() / STEPS, atol=1e-4, rtol=1e-4)


def test_several_answers_are_sampled_from_one_page(deepseek, prompt):
    prompts = _shortened(deepseek, prompt, 0.5, [])
    with RTPrune(keep_tokens=0.5).attach(deepseek):
        made = deepseek.generate(**prompt, **LOGITS, do_sample=True, num_return_sequences=2)
    answers = made.sequences[:, prompt["input_ids"].shape[1] :]
    for row, answer in enumerate(answers):
        expected = _logits(deepseek, prompts[row // 2], answer)
        logits = torch.stack(made.logits, 1)[row]
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)


def test_a_loop_of_calls_continues_the_cache(deepseek, prompt):
    """Without mask and position ids, as one may write it for one page."""
    alone = {
        "input_ids": prompt["input_ids"][1:, prompt["attention_mask"][1] == 1],
        "pixel_values": prompt["pixel_values"][1:],
        "num_local_patches": [0],
        "patches_grid": [[1, 1]],
    }
    mask = torch.ones_like(alone["input_ids"])
    [left] = _shortened(deepseek, {**alone, "attention_mask": mask}, 0.5, [])
    answer = torch.tensor([5, 9, 7, 11])
    with RTPrune(keep_tokens=0.5).attach(deepseek):
        read = deepseek(**alone)
        assert read.logits.shape[1] == len(left[1]) == cache_in(read).get_seq_length()
        one = deepseek(input_ids=answer[None, :1], **{cache_argument(deepseek): cache_in(read)})
        more = deepseek(input_ids=answer[None, 1:3], **{cache_argument(deepseek): cache_in(read)})
    got = torch.cat([read.logits[0, -1:], one.logits[0], more.logits[0]])
    torch.testing.assert_close(got, _logits(deepseek, left, answer), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("keep_tokens", few([0.6, "dynamic"], "dynamic"))
def test_a_batch_of_different_pages_is_one_by_one(deepseek, keep_tokens):
    texts = ["a", "all of it", "bc", "read", "d", "ef", "read all", "ghi"]
    pages = [ocr.page(100, 90 + 20 * i, i, 0.1 + 0.12 * i) for i in range(8)]
    with RTPrune(keep_tokens=keep_tokens).attach(deepseek) as handle:
        together = deepseek(**ocr.deepseek_prompt(pages, texts)).logits[:, -1]
        batch, handle.pages = handle.pages, []
        for row, (page, text) in enumerate(zip(pages, texts, strict=True)):
            alone = deepseek(**ocr.deepseek_prompt([page], [text])).logits[0, -1]
            torch.testing.assert_close(together[row], alone, atol=1e-4, rtol=1e-4)
            assert torch.equal(batch[row].kept_indices, handle.pages[row].kept_indices)
    fractions = {page.keep_fraction for page in batch}
    assert len(fractions) == (8 if keep_tokens == "dynamic" else 1)
    if keep_tokens == "dynamic":  # so that the batch is padded
        assert len({len(page.kept_indices) for page in batch}) > 2


def _moved(scores, *sizes):
    """In place of POT, which goes from page to page on a CPU."""
    return scores.softmax(1)


@pytest.mark.parametrize("keep_tokens", few([0.6, "dynamic"], "dynamic"))
def test_a_batch_takes_as_many_operators_and_waits_as_a_page(deepseek, keep_tokens, monkeypatch):
    copies, on_cpu = [], torch.Tensor.cpu
    monkeypatch.setattr("compress.methods.rtprune.pages.transport_plans", _moved)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda x: copies.append(x.shape) or on_cpu(x))
    seen = []
    for count in (1, 5):
        pages = [ocr.page(200, 200, seed, 0.3) for seed in range(count)]
        inputs = ocr.deepseek_prompt(pages, ["a"] * count)
        counts = []
        for method in (None, RTPrune(keep_tokens=keep_tokens)):
            copies.clear()
            with Counted() as counted, method.attach(deepseek) if method else nullcontext():
                deepseek(**inputs)
            counts.append((counted.of_numbers.total(), len(copies)))
        dense, ours = counts
        seen.append((ours[0] - dense[0], ours[1] - dense[1]))
    # at once: what is visual and what is padding, the order of the tokens and the ratios
    assert [copied for _, copied in seen] == [1, 1]
    assert seen[0][0] <= (50 if keep_tokens == "dynamic" else 25)
    # pages that keep different numbers of tokens give the text model a mask
    assert seen[1][0] - seen[0][0] <= (8 if keep_tokens == "dynamic" else 0)


@pytest.mark.parametrize(
    ("keep_tokens", "densities", "more"),
    # position ids; and a mask, where pages keep different numbers
    few([(0.5, (0.3, 0.3), 3), ("dynamic", (0.1, 0.7), 8)], ("dynamic", (0.1, 0.7), 8)),
    ids=["equally many", "padded"],
)
def test_a_step_takes_about_the_operators_of_a_dense_one(deepseek, keep_tokens, densities, more):
    pages = [ocr.page(200, 200, seed, density) for seed, density in enumerate(densities)]
    inputs = ocr.deepseek_prompt(pages, ["a"] * 2)

    def per_step():
        totals = []
        for new in (3, 5):
            with Counted() as counted:
                deepseek.generate(**inputs, do_sample=False, max_new_tokens=new, min_new_tokens=new)
            totals.append(counted.total)
        return (totals[1] - totals[0]) / 2

    dense = per_step()
    with RTPrune(keep_tokens=keep_tokens).attach(deepseek):
        assert per_step() <= dense + more


@pytest.mark.gpu
def test_the_device_is_waited_for_once():
    generator = torch.Generator().manual_seed(0)
    grid = view_tokens(0, 12, 12, True)
    features = [torch.randn(len(grid), 64, generator=generator).cuda() for _ in range(4)]
    density = torch.rand(4, generator=generator).cuda()
    pages = [EncodedPage(grid, each) for each in density]
    bias = torch.zeros(64).cuda()  # which waits itself
    for _ in range(2):  # the first compiles
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            prune_pages(RTPrune(), pages, features, [], bias)
        torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(warning.message) for warning in caught) == 1


# ---- laws --------------------------------------------------------------------------------------


def _traces(model):
    """What a method could leave behind."""
    hooks = [
        (name, len(module._forward_pre_hooks), len(module._forward_hooks), sorted(vars(module)))
        for name, module in model.named_modules()
    ]
    return hooks, copy.deepcopy(model.generation_config.to_dict()), model.config.to_dict()


# its own selection, and one that records the encoder's attention
@pytest.mark.parametrize("select", few(SELECTIONS, "rtprune", "visionzip"))
def test_all_of_a_page_is_the_dense_model_bit_by_bit(deepseek, prompt, select):
    before = _traces(deepseek)
    dense = deepseek(**prompt).logits
    messages = deepseek.generate(**prompt, **NO_STOP, do_sample=False)
    with RTPrune(keep_tokens=1.0, select=select).attach(deepseek) as handle:
        assert _traces(deepseek) != before
        assert torch.equal(deepseek(**prompt).logits, dense)
        assert torch.equal(deepseek.generate(**prompt, **NO_STOP, do_sample=False), messages)
        assert [page["kept"] for page in handle.facts()["pages"]] == [40, 16] * 2
    assert _traces(deepseek) == before


@pytest.mark.parametrize("select", few(SELECTIONS, "rtprune", "visionzip"))
def test_two_runs_are_identical_and_leaving_restores(deepseek, prompt, select):
    before, dense = _traces(deepseek), deepseek(**prompt).logits
    method = RTPrune(keep_tokens=0.5, select=select)
    runs = []
    for _ in range(2):
        with method.attach(deepseek) as handle:
            runs.append(deepseek(**prompt).logits)
            assert [page["kept"] for page in handle.facts()["pages"]] == [20, 8]
    assert torch.equal(*runs) and runs[0].shape[1] < dense.shape[1]
    with pytest.raises(KeyError, match="inside"), method.attach(deepseek):
        raise KeyError("inside")
    assert _traces(deepseek) == before
    assert torch.equal(deepseek(**prompt).logits, dense)


def _last(model, inputs, **knobs):
    with RTPrune(keep_tokens=0.5, **knobs).attach(model):
        return model(**inputs).logits[:, -1]


def test_every_knob_has_an_effect(deepseek, prompt):
    plain = _last(deepseek, prompt)
    bare = _last(deepseek, prompt, merge=0.0)
    assert torch.equal(bare, _last(deepseek, prompt, select="norm"))
    others = [
        bare,
        _last(deepseek, prompt, merge=0.3),
        _last(deepseek, prompt, transport="nearest"),
        *[_last(deepseek, prompt, select=s) for s in ("visionzip", "divprune", "cdpruner")],
        _last(deepseek, prompt, select="random"),
        _last(deepseek, prompt, select="random", seed=1),
    ]
    for number, other in enumerate(others):
        assert not any(torch.equal(other, one) for one in [plain, *others[:number]])
    assert torch.equal(others[-1], _last(deepseek, prompt, select="random", seed=1, merge=0.3))


def test_random_tokens_are_the_page_s_whatever_its_batch(deepseek):
    pages = [ocr.page(100, 100, seed) for seed in range(3)]
    with RTPrune(keep_tokens=0.5, select="random").attach(deepseek) as handle:
        deepseek(**ocr.deepseek_prompt(pages, ["a"] * 3))
        deepseek(**ocr.deepseek_prompt(pages[::-1], ["b"] * 3))
    kept = [page.kept_indices.tolist() for page in handle.pages]
    assert kept[:3] == kept[:2:-1] and kept[0] != kept[1]


def test_facts_count_what_is_left(deepseek, prompt):
    with RTPrune().attach(deepseek) as handle:
        deepseek(**prompt)
        facts = handle.facts()
        for page, numbers in zip(handle.pages, facts["pages"], strict=True):
            kept = page.grid[page.kept_indices]
            assert numbers["visual_tokens"] == len(page.grid)
            assert numbers["visual_kept"] == len(kept)
            assert numbers["kept"] == int((kept[:, 2] >= 0).sum())
            assert numbers["kept"] == int(numbers["prunable"] * numbers["keep_fraction"])
            d, s = numbers["density"], numbers["distinctness"]
            assert numbers["keep_fraction"] == pytest.approx(d + s - d * s)
            dropped = numbers["visual_tokens"] - numbers["prunable"] - (len(kept) - numbers["kept"])
            assert numbers["newlines_dropped"] == dropped
        assert facts["total"]["kept"] == sum(page["kept"] for page in facts["pages"])
        handle.reset()
        assert handle.facts() == {"pages": [], "total": dict.fromkeys(facts["total"], 0)}


def test_a_prompt_without_a_page_is_not_changed(deepseek):
    ids = torch.tensor([[1, 7, 8, 9]])
    dense = deepseek.generate(ids, **NO_STOP, do_sample=False)
    with RTPrune(keep_tokens=0.5).attach(deepseek) as handle:
        assert torch.equal(deepseek.generate(ids, **NO_STOP, do_sample=False), dense)
    assert handle.pages == []


def test_other_methods_get_the_layouts_of_what_is_left(deepseek, prompt):
    """Also those that came first, whose hooks run behind."""
    seen = []
    decoder = text_model(deepseek)
    hook = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    whole = visual_layouts(deepseek, prompt)
    dense = _embeddings(deepseek, prompt)
    seen.clear()
    with RTPrune(keep_tokens=0.5, select="norm").attach(deepseek) as handle:
        deepseek(**prompt)
    hook.remove()
    embeds, layouts = seen[0]["inputs_embeds"], seen[0][VISUAL_LAYOUTS]
    for row, (layout, page) in enumerate(zip(layouts, handle.pages, strict=True)):
        assert torch.equal(layout.grid, page.grid[page.kept_indices])
        places = whole[row].positions[page.kept_indices]
        assert torch.equal(embeds[row, layout.positions], dense[row, places])


def test_where_nothing_is_pruned_nothing_is_changed(deepseek, prompt):
    seen = []
    hook = text_model(deepseek).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    with RTPrune(keep_tokens=1.0).attach(deepseek):
        deepseek(**prompt)
    hook.remove()
    assert seen[0]["attention_mask"] is prompt["attention_mask"]
    assert seen[0]["position_ids"] is None and VISUAL_LAYOUTS not in seen[0]


@pytest.mark.parametrize(
    ("dtype", "keep_tokens"), [(torch.bfloat16, 0.5), (torch.float16, "dynamic")]
)
def test_half_precision_is_close_to_float32(prompt, dtype, keep_tokens):
    """The same rounded weights and pixels in float32; both keep the same tokens here."""
    model = ocr.deepseek_ocr().to(dtype)
    inputs = {k: v.to(dtype) if k.startswith("pixel") else v for k, v in prompt.items()}
    result, kept = {}, {}
    for precision in (dtype, torch.float32):
        model = model.to(precision)
        given = {k: v.to(precision) if "pixel" in k else v for k, v in inputs.items()}
        with RTPrune(keep_tokens=keep_tokens).attach(model) as handle:
            result[precision] = model(**given).logits[:, -1].float()
        kept[precision] = [page.kept_indices.tolist() for page in handle.pages]
    assert kept[dtype] == kept[torch.float32]
    # roundings of some ten layers: a few units in the last place of the largest logit
    tolerance = 4 * torch.finfo(dtype).eps * result[torch.float32].abs().max().item()
    torch.testing.assert_close(result[dtype], result[torch.float32], atol=tolerance, rtol=0)


# ---- with FastOCR ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "first"),
    [("deepseek_ocr", "rtprune"), ("unlimited_ocr", "fastocr"), ("deepseek_ocr2", "rtprune")],
)
def test_fastocr_with_all_tokens_leaves_rtprune_as_it_is(prompt, family, first):
    model = getattr(ocr, family)()
    inputs = ocr.deepseek2_prompt(["read"]) if family == "deepseek_ocr2" else prompt
    pruning, fixating = RTPrune(keep_tokens=0.5), paper(keep_visual=1.0, focal_layers=[1])
    result = []
    for methods in ([pruning], [pruning, fixating] if first == "rtprune" else [fixating, pruning]):
        with Applied(model, methods) as applied:
            result.append(model.generate(**inputs, **LOGITS, do_sample=False))
            facts = applied.facts()
    assert torch.equal(result[0].sequences, result[1].sequences)
    for alone, both in zip(result[0].logits, result[1].logits, strict=True):
        torch.testing.assert_close(both, alone, atol=1e-4, rtol=1e-4)
    pages, counted = facts["rtprune"]["total"], facts["fastocr"]
    assert counted["visual_tokens"] * len(inputs["input_ids"]) == pages["visual_kept"]
    assert pages["visual_kept"] < pages["visual_tokens"] and counted["attended"] == 1


# ---- what VisionZip needs ----------------------------------------------------------------------


@pytest.mark.parametrize("family", ["deepseek", "second"])
def test_the_recorded_attention_is_the_encoder_s(request, family):
    model = request.getfixturevalue(family)
    tower = copy.deepcopy(model.model.vision_tower)
    tower.set_attn_implementation("eager")
    side = 256 if family == "deepseek" else 768
    pixels = torch.rand(2, 3, side, side) * 2 - 1
    recorder = EncoderRecorder()
    with recorder.recording(tower.vision_encoder):
        weights = tower(pixels, output_attentions=True).attentions[-1]
    [(attention, keys)] = recorder.captured
    if family == "deepseek":
        expected = weights[:, :, 0, 1:].sum(1)
        assert keys.shape == (2, 16, 8)
    else:  # 144 queries behind 144 patches, each seen by itself and those behind it
        weights = weights[:, :, 144:, 144:].mean(1)
        expected = torch.stack([weights[:, i:, i].mean(1) for i in range(144)], 1)
        assert keys.shape == (2, 144, 8)
    expected = expected / expected.mean(1, keepdim=True)
    torch.testing.assert_close(attention, expected, atol=1e-4, rtol=1e-4)


# ---- refusals ----------------------------------------------------------------------------------


def test_only_the_three_families_are_pruned():
    stranger = SimpleNamespace(config=Qwen2_5_VLConfig())
    with pytest.raises(ValueError, match=r"got Qwen2.5-VL \(model_type='qwen2_5_vl'\)"):
        RTPrune().attach(stranger).__enter__()


def test_a_model_is_pruned_once(deepseek, prompt):
    with RTPrune(keep_tokens=0.5).attach(deepseek):
        expected = deepseek(**prompt).logits
        with pytest.raises(ValueError, match="being pruned already; leave the first"):
            RTPrune(keep_tokens=0.2).attach(deepseek).__enter__()
        assert torch.equal(deepseek(**prompt).logits, expected)


def _refused(model, message, call):
    with RTPrune(keep_tokens=0.5).attach(model), pytest.raises(ValueError, match=message) as error:
        call()
    assert "RTPrune" in str(error.value)


def test_calls_that_cannot_work_are_refused(deepseek, prompt):
    _refused(deepseek, "got labels", lambda: deepseek(**prompt, labels=prompt["input_ids"]))
    places = torch.tensor([3])
    _refused(deepseek, "got a tensor", lambda: deepseek(**prompt, logits_to_keep=places))
    lookup = {"prompt_lookup_num_tokens": 2, "max_new_tokens": 3}
    alone = _first(prompt)
    _refused(deepseek, "assisted generation", lambda: deepseek.generate(**alone, **lookup))
    chunks = {"prefill_chunk_size": 8, "max_new_tokens": 3}
    _refused(deepseek, "prefill_chunk_size=8", lambda: deepseek.generate(**prompt, **chunks))
    turned = {**prompt, "attention_mask": prompt["attention_mask"].flip(1)}
    _refused(deepseek, "padding on the left", lambda: deepseek(**turned))
    cache = DynamicCache(config=deepseek.config.text_config)
    deepseek(input_ids=torch.tensor([[1, 5]] * 2), **{cache_argument(deepseek): cache})
    _refused(
        deepseek,
        "a cache of 2 tokens",
        lambda: deepseek(**prompt, **{cache_argument(deepseek): cache}),
    )
    encoding = {k: v for k, v in prompt.items() if k not in ("input_ids", "attention_mask")}
    outside = {"image": deepseek.model.get_image_features(**encoding, return_dict=True)}
    ids = {k: prompt[k] for k in ("input_ids", "attention_mask")}
    _refused(deepseek, "made outside", lambda: deepseek(**ids, mm_encoder_outputs=outside))


def test_generate_continues_a_pruned_cache_by_the_new_tokens_alone(deepseek, prompt):
    prompts = _shortened(deepseek, prompt, 0.5, [])
    with RTPrune(keep_tokens=0.5).attach(deepseek):
        made = deepseek.generate(**prompt, **LOGITS, do_sample=False)
        ids = torch.cat([made.sequences, torch.full((2, 2), 9)], 1)
        mask = torch.nn.functional.pad(prompt["attention_mask"], (0, STEPS + 2), value=1)
        turn = {
            "attention_mask": mask,
            cache_argument(deepseek): cache_in(made),
            "do_sample": False,
            **LOGITS,
        }
        with pytest.raises(ValueError, match="the new tokens alone, with the mask of all"):
            deepseek.generate(ids, **turn)
        second = deepseek.generate(ids[:, -3:], **turn)  # the last of the answer was not read yet
    whole = torch.cat([ids, second.sequences[:, 3:]], 1)[:, prompt["input_ids"].shape[1] :]
    logits = torch.stack(second.logits, 1)
    for row, left in enumerate(prompts):
        expected = _logits(deepseek, left, whole[row])[-STEPS:]
        torch.testing.assert_close(logits[row], expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("family", "keep_tokens"), [("deepseek", "dynamic"), ("deepseek", 1.0), ("second", "dynamic")]
)
def test_a_page_without_crops_needs_no_sizes(request, family, keep_tokens):
    model = request.getfixturevalue(family)
    if family == "deepseek":
        inputs = ocr.deepseek_prompt([ocr.page(128, 128, 1, 0.3)], ["a"])
    else:
        inputs = {k: v[1:] for k, v in ocr.deepseek2_prompt(["read", "a"]).items()}
        del inputs["pixel_values_local"]
    sizes = ("num_local_patches", "patches_grid")
    bare = {k: v for k, v in inputs.items() if k not in sizes}
    with RTPrune(keep_tokens=keep_tokens).attach(model) as handle:
        expected = model.generate(**inputs, **LOGITS, do_sample=False)
        result = model.generate(**bare, **LOGITS, do_sample=False)
        first, again = handle.facts()["pages"]
    assert torch.equal(torch.stack(result.logits), torch.stack(expected.logits))
    assert first == again


def test_a_cache_that_was_reset_takes_another_prompt(deepseek, prompt):
    cache = StaticCache(config=deepseek.config.text_config, max_cache_len=80)
    ids = torch.tensor([[1, 7, 8, 9]])
    dense = deepseek.generate(ids, **NO_STOP, do_sample=False)
    with RTPrune(keep_tokens=0.5).attach(deepseek):
        deepseek(**_first(prompt), **{cache_argument(deepseek): cache})
        cache.reset()
        made = deepseek.generate(
            ids, **NO_STOP, do_sample=False, **{cache_argument(deepseek): cache}
        )
    assert torch.equal(made, dense)


@pytest.mark.parametrize(
    "knobs",
    [{"keep_tokens": 0}, {"keep_tokens": 1.1}, {"keep_tokens": "most"}, {"merge": -0.1},
     {"select": "topk"}, {"seed": -1}, {"keep": 0.5}],
    ids=str,
)  # fmt: skip
def test_impossible_knobs_are_refused(knobs):
    with pytest.raises(ValueError, match=f"RTPrune: {next(iter(knobs))}"):
        RTPrune(**knobs)
