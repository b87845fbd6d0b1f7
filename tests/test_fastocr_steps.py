"""A decode step under FastOCR: it waits for nothing, and can be replayed as a graph."""

import weakref
from contextlib import contextmanager, suppress
from itertools import product

import pytest
import torch
from transformers import DynamicCache, StaticCache

from builders import fastocr
from builders.counting import Counted, Tape
from builders.fastocr import PAGES, TEXTS, paper, write
from builders.tiers import few
from compress.methods.fastocr import attention, hooks, state
from compress.methods.fastocr.policy import make_policy
from compress.methods.fastocr.visual_tokens import VisualTokens
from compress.methods.rtprune import RTPrune
from compress.models import captured_call
from compress.models.cache_argument import cache_argument
from compress.models.captured_call import CapturedCall, CudaGraph
from compress.models.generation import checked_generation, replaced_method
from compress.models.growing_cache import growing_caches
from compress.models.reading import read_pages
from compress.models.visual import build_prompt, text_model, visual_layouts

STEPS = 6


@pytest.fixture(scope="module")
def intern():
    """With plain position ids, for loops of one's own."""
    return fastocr.model("internvl", layers=4)


def _steps(model, inputs, **settings):
    """What each call of the model did while it answered."""
    counts = []

    def forward(original, *args, **kwargs):
        with Counted() as counted:
            output = original(*args, **kwargs)
        counts.append(counted)
        return output

    with replaced_method(model, "forward", forward):
        write(model, inputs, 3, **settings)
    return counts


@pytest.mark.parametrize(
    ("name", "pages", "cache"),
    few(
        product(["internvl", "unlimited_ocr"], [1, 3], ["in place", "dynamic", "static"]),
        ("internvl", 1, "in place"),
        ("internvl", 3, "dynamic"),
        ("internvl", 1, "static"),
        ("unlimited_ocr", 3, "in place"),
        ("unlimited_ocr", 1, "dynamic"),
        ("unlimited_ocr", 3, "static"),
    ),
)
def test_a_step_waits_for_nothing(name, pages, cache):
    model, processor = fastocr.model(name)
    inputs = build_prompt(model, processor, PAGES[:pages], TEXTS[:pages])

    def waits(method=None):
        settings = {"cache_implementation": "static"} if cache == "static" else {}
        if cache == "dynamic":  # one of transformers', given by the user
            empty = DynamicCache(config=text_model(model).config)
            settings[cache_argument(model)] = empty
        if method is None:
            with growing_caches(model):
                steps = _steps(model, inputs, **settings)
        else:
            with method.attach(model):
                steps = _steps(model, inputs, **settings)
        return [step.waits for step in steps[1:]]

    dense = waits()  # transformers looks whether a mask of a padded batch hides anything
    assert waits(paper(keep_visual=0.1, focal_layers=[1], periphery=4)) == dense
    assert waits(paper(keep_visual=0.1, choose="summaries")) == dense
    assert pages == 3 or not any(dense)


def _answer(model, inputs, method, cache, recorded=None):
    """Logits of each step, ``(steps, batch, vocabulary)``, and the counts.

    From the step ``recorded`` on, which is recorded, they are replays.
    """
    tape, logits = Tape(), []
    length = inputs["attention_mask"].shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, STEPS), value=1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    tokens = torch.arange(STEPS * len(mask)).view(STEPS, -1, 1) % 20 + 20
    given = {cache_argument(model): cache, "attention_mask": mask}
    if len(mask) == 1:  # nothing is hidden but what is not written
        given["attention_mask"] = None
    ids, at = tokens[0].clone(), places[:, length : length + 1].clone()
    with torch.no_grad(), method.attach(model) as handle:
        prompt = {**inputs, **given, "position_ids": places[:, :length]}
        model(**{**prompt, "attention_mask": mask[:, :length]})
        for step in range(STEPS):
            ids.copy_(tokens[step])
            at.copy_(places[:, length + step, None])
            if recorded is None or step < recorded:
                output = model(input_ids=ids, position_ids=at, **given)
            elif step == recorded:
                with tape:
                    output = model(input_ids=ids, position_ids=at, **given)
            else:
                tape.replay()
            logits.append(output.logits[:, -1].clone())
        return torch.stack(logits), handle.facts()


REPLAYED = (
    (1, {"focal_layers": [1]}),
    (3, {"focal_layers": [0, 2], "dilate": 1}),
    (1, {"focal_layers": [2], "reuse": False}),
    (3, {"focal_layers": [1], "fixation": "static"}),
    (3, {"focal_layers": [1], "periphery": 4}),
    (1, {"choose": "summaries"}),
)


@pytest.mark.parametrize(
    ("pages", "knobs"),
    few(product([1, 3], [knobs for _, knobs in REPLAYED]), *REPLAYED),
    ids=str,
)
def test_a_recorded_step_is_replayed_at_later_ones(intern, pages, knobs):
    model, processor = intern
    inputs = build_prompt(model, processor, PAGES[:pages], TEXTS[:pages])
    method = paper(keep_visual=0.1, min_visual=0, **knobs)

    def answer(recorded=None):
        length = inputs["input_ids"].shape[1] + STEPS
        cache = StaticCache(config=text_model(model).config, max_cache_len=length)
        return _answer(model, inputs, method, cache, recorded)

    (expected, facts), (found, counted) = answer(), answer(recorded=2)
    assert torch.equal(found, expected) and counted == facts
    assert len({tuple(row.tolist()) for row in found[:, 0]}) == STEPS


@pytest.mark.parametrize(
    ("knobs", "calls"),
    [
        ({"focal_layers": [1]}, 5),
        ({"focal_layers": "auto", "warmup": 2}, 6),
        ({"focal_layers": [1], "min_mass": 0.5}, STEPS + 1),  # the guard waits for the device
        pytest.param({"focal_layers": [1], "fixation": "oracle"}, 5, marks=pytest.mark.slow),
        ({"focal_layers": [1], "periphery": 4}, 5),
        ({"choose": "summaries"}, 5),
        ({"min_visual": 10_000}, 4),
    ],
    ids=str,
)
def test_generate_replays_its_steps_over_a_static_cache(intern, monkeypatch, knobs, calls):
    model, processor = intern
    inputs = build_prompt(model, processor, PAGES, TEXTS)
    method, seen = paper(keep_visual=0.1, **({"min_visual": 0} | knobs)), []
    monkeypatch.setattr(captured_call, "CudaGraph", Tape)
    monkeypatch.setattr(hooks, "_fixed", lambda cache: isinstance(cache, StaticCache))

    def count(original, *args, **kwargs):
        seen.append(kwargs)
        return original(*args, **kwargs)

    def answer(**settings):
        seen.clear()
        with replaced_method(text_model(model), "forward", count), method.attach(model) as handle:
            answers = [
                write(model, inputs, STEPS, cache_implementation="static", **settings)
                for _ in range(2)
            ]
            return answers, handle.facts(), len(seen) / 2

    expected, facts, every = answer(disable_compile=True)
    found, counted, some = answer()
    for (tokens, logits), (same, equal) in zip(found, expected, strict=True):
        assert torch.equal(tokens, same) and torch.equal(logits, equal)
    assert counted == facts and every == STEPS + 1 and some == calls


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["internvl", "qwen2_5_vl", "glm_ocr"])
@pytest.mark.parametrize(
    "knobs",
    [{"focal_layers": [1]}, {"focal_layers": [1], "periphery": 4}, {"choose": "summaries"}],
    ids=str,
)
def test_on_a_gpu_captured_steps_write_the_same(name, knobs, monkeypatch):
    model, processor = fastocr.model(name)
    model.cuda()
    built = build_prompt(model, processor, PAGES, TEXTS)
    inputs = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in built.items()}
    with paper(keep_visual=0.1, min_visual=0, **knobs).attach(model) as handle:
        settings = {"cache_implementation": "static"}
        expected = write(model, inputs, STEPS, disable_compile=True, **settings)
        facts = handle.facts()
        handle.reset()
        replay, replays = CudaGraph.replay, []
        monkeypatch.setattr(CudaGraph, "replay", lambda graph: (replay(graph), replays.append(1)))
        found = write(model, inputs, STEPS, **settings)
        assert handle.facts() == facts and len(replays) > 2
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("knobs", [{"focal_layers": [1]}, {"choose": "summaries"}], ids=str)
def test_a_long_answer_is_captured_anew(intern, monkeypatch, knobs):
    model, processor = intern
    inputs = build_prompt(model, processor, PAGES, TEXTS)
    method, ends = paper(keep_visual=0.1, min_visual=0, **knobs), []
    monkeypatch.setattr(captured_call, "CudaGraph", Tape)
    monkeypatch.setattr(hooks, "_fixed", lambda cache: isinstance(cache, StaticCache))

    def answer(piece):
        monkeypatch.setattr(state, "PIECE", piece)
        with method.attach(model) as handle:
            return *write(model, inputs, 16, cache_implementation="static"), handle.facts()

    masked = state.DecodeState._masked

    def watched(*args):
        read = masked(*args)
        ends.append(read[2][1] - read[2][0])
        return read

    tokens, logits, facts = answer(512)
    monkeypatch.setattr(state.DecodeState, "_masked", watched)
    again, same, counted = answer(5)
    assert torch.equal(again, tokens) and counted == facts
    torch.testing.assert_close(same, logits, atol=1e-5, rtol=0)
    assert set(ends) == {5, 10, 15, 16}  # and no row that no step of the piece writes


def test_what_was_captured_dies_with_its_cache(intern, monkeypatch):
    model, processor = intern
    inputs = build_prompt(model, processor, PAGES[:1], TEXTS[:1])
    monkeypatch.setattr(captured_call, "CudaGraph", Tape)
    monkeypatch.setattr(hooks, "_fixed", lambda cache: isinstance(cache, StaticCache))
    with paper(keep_visual=0.1, focal_layers=[1], min_visual=0).attach(model) as handle:
        length = inputs["input_ids"].shape[1] + STEPS
        cache = StaticCache(config=text_model(model).config, max_cache_len=length)
        write(model, inputs, 5, **{cache_argument(model): cache})
        captured = weakref.ref(handle.states[cache].captured)
        assert captured()
        del cache
        assert captured() is None


def test_a_method_that_is_attached_later_leaves_the_steps_captured(intern, monkeypatch):
    model, processor = intern
    inputs = build_prompt(model, processor, PAGES[:1], TEXTS[:1])
    given = []
    monkeypatch.setattr(hooks, "_fixed", lambda cache: given.append(cache))

    def captures(**settings):
        given.clear()
        with (
            paper(keep_visual=0.1, focal_layers=[1], min_visual=0).attach(model),
            checked_generation(model, lambda mode, config: None),
        ):
            write(model, inputs, 2, cache_implementation="static", **settings)
        return bool(given)

    assert captures() and not captures(disable_compile=True)


def test_a_later_turn_is_captured_anew(intern, monkeypatch):
    """It may step over the end of the piece that the captured step reads."""
    model, processor = intern
    inputs = build_prompt(model, processor, PAGES, TEXTS)
    length = inputs["input_ids"].shape[1]
    monkeypatch.setattr(captured_call, "CudaGraph", Tape)
    monkeypatch.setattr(hooks, "_fixed", lambda cache: isinstance(cache, StaticCache))
    monkeypatch.setattr(state, "PIECE", 8)

    def answers(**settings):
        cache = StaticCache(config=text_model(model).config, max_cache_len=length + 20)
        settings[cache_argument(model)] = cache
        tokens, first = write(model, inputs, 5, **settings)
        ids = torch.cat([inputs["input_ids"], tokens, torch.arange(30, 36).expand(3, -1)], 1)
        more = (0, ids.shape[1] - length)
        mask = torch.nn.functional.pad(inputs["attention_mask"], more, value=1)
        later = {"input_ids": ids, "attention_mask": mask}
        return torch.cat([first, write(model, later, 6, **settings)[1]], 1)

    with paper(keep_visual=0.1, focal_layers=[1], min_visual=0).attach(model):
        assert torch.equal(answers(), answers(disable_compile=True))


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (
            RuntimeError("not permitted when capturing\nmore"),
            "got: not permitted when.*; pass disa",
        ),
        (torch.OutOfMemoryError("too large"), "^too large$"),
    ],
    ids=["waits", "memory"],
)
def test_what_cannot_be_captured_says_so(intern, monkeypatch, error, shown):
    model, processor = intern
    inputs = build_prompt(model, processor, PAGES[:1], TEXTS[:1])
    monkeypatch.setattr(hooks, "_fixed", lambda cache: isinstance(cache, StaticCache))
    current = ["default"]

    @contextmanager
    def stream(stream):
        before = current[:]
        current.append(stream)
        try:
            yield
        finally:
            current[:] = before

    @contextmanager
    def graph(graph, stream, capture_error_mode):
        assert current == ["default", ("stream", torch.device("cpu"))]  # of the cache's device
        current.append(stream)  # not left, as torch does not leave it where a capture cannot end
        with suppress(RuntimeError):
            yield
        raise error

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: ("stream", device))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    kind = ValueError if type(error) is RuntimeError else type(error)
    with (
        paper(keep_visual=0.1, focal_layers=[1], min_visual=0).attach(model),
        pytest.raises(kind, match=shown),
    ):
        write(model, inputs, STEPS, cache_implementation="static")
    assert current == ["default"]


def _captured(monkeypatch):
    """Let steps over static caches be recorded; what was, and what was replayed."""
    recorded, replayed = [], []

    class Watched(CapturedCall):
        def __init__(self, *args):
            recorded.append(1)
            super().__init__(*args)

        def replay(self, inputs):
            replayed.append(1)
            super().replay(inputs)

    monkeypatch.setattr(captured_call, "CudaGraph", Tape)
    monkeypatch.setattr(hooks, "CapturedCall", Watched)
    monkeypatch.setattr(hooks, "_records", lambda device: True)
    return recorded, replayed


def test_readers_ask_for_a_static_cache_where_steps_over_it_are_captured(
    intern, monkeypatch, caplog
):
    model, processor = intern
    method, asked = paper(keep_visual=0.1, focal_layers=[1], min_visual=0), []

    def note(original, *args, **kwargs):
        asked.append(kwargs.get("cache_implementation"))
        return original(*args, **kwargs)

    def read():
        with replaced_method(model, "generate", note):
            return read_pages(model, processor, PAGES, "Read.", max_new_tokens=STEPS)

    dense = read()
    with method.attach(model):
        expected = read()
    recorded, replayed = _captured(monkeypatch)
    with method.attach(model):
        assert read() == expected and recorded and replayed
    with method.attach(model), monkeypatch.context() as patch:
        patch.setattr(Tape, "__enter__", refuse)
        assert read() == expected and read() == expected  # tried with the first pages alone
        [warning] = [record.getMessage() for record in caplog.records]
        assert warning.endswith("nothing can be captured")
    assert read() == dense and asked == [None, None, "static", "static", None, None, None]
    with method.attach(model), monkeypatch.context() as patch:
        patch.setattr(model, "hf_device_map", {"a": 0, "b": 1}, raising=False)
        assert read() == expected and asked[-1] is None


def refuse(*_):
    raise ValueError("nothing can be captured")


def test_what_is_captured_is_replayed(monkeypatch):
    """The mask of a prompt that another method shortened grows with each step."""
    model, processor = fastocr.model("deepseek_ocr2")
    inputs = build_prompt(model, processor, PAGES, TEXTS)
    recorded, replayed = _captured(monkeypatch)
    with (
        RTPrune(keep_tokens=0.5).attach(model),
        paper(keep_visual=0.1, focal_layers=[1], min_visual=0).attach(model),
    ):
        write(model, inputs, STEPS, cache_implementation="static")
    assert len(recorded) <= len(replayed)


@pytest.mark.parametrize("knobs", [{"focal_layers": [1]}, {"min_visual": 10_000}], ids=str)
def test_a_step_that_fails_is_not_counted(intern, knobs):
    model, processor = intern
    inputs = build_prompt(model, processor, PAGES, TEXTS)
    calls = []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == 4:  # the prompt is read, and two steps are done
            raise KeyboardInterrupt

    with paper(keep_visual=0.1, **{"min_visual": 0} | knobs).attach(model) as handle:
        write(model, inputs, 2)
        expected = handle.facts()
        handle.reset()
        hook = text_model(model).layers[2].register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            write(model, inputs, 5)
        hook.remove()
        found = handle.facts()
        assert found.pop("switched_off") == expected.pop("switched_off") and found == expected


def test_a_prompt_of_one_token_into_an_emptied_cache_is_none_of_its_steps(intern):
    model, processor = intern
    inputs = build_prompt(model, processor, PAGES[:1], TEXTS[:1])
    short = {"input_ids": torch.tensor([[30]]), "attention_mask": torch.tensor([[1]])}
    expected = write(model, short, 3)[0]
    length = inputs["input_ids"].shape[1] + STEPS
    cache = StaticCache(config=text_model(model).config, max_cache_len=length)
    with paper(keep_visual=0.1, focal_layers=[1], min_visual=0).attach(model) as handle:
        write(model, inputs, 3, **{cache_argument(model): cache})
        facts = handle.facts()
        cache.reset()
        assert torch.equal(write(model, short, 3, **{cache_argument(model): cache})[0], expected)
        assert handle.facts() == facts  # without pages there is nothing to count


def test_what_was_replaced_is_restored_and_abandoned_contexts_end_in_any_order():
    class Owner:
        def method(self):
            return []

    def add(word):
        return replaced_method(owner, "method", lambda original: [*original(), word])

    owner = Owner()
    with add("outer"):
        with add("inner"):
            assert owner.method() == ["outer", "inner"]
        assert owner.method() == ["outer"]
    assert owner.method() == [] and not vars(owner)
    outer, inner = add("outer"), add("inner")
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    inner.__exit__(None, None, None)


def test_a_step_over_a_growing_cache_cannot_be_replayed(intern):
    """The control: what is recorded there reads the keys and values of its own step."""
    model, processor = intern
    inputs = build_prompt(model, processor, PAGES[:1], TEXTS[:1])
    method = paper(keep_visual=0.1, focal_layers=[1], min_visual=0)
    cache = DynamicCache(config=text_model(model).config)
    with pytest.raises(AssertionError, match="was given back"):
        _answer(model, inputs, method, cache, recorded=2)


def test_a_sparse_layer_is_given_no_mask_where_nothing_is_hidden(intern, monkeypatch):
    model, processor = intern
    given = []
    sparse = "compress.methods.fastocr.state.sparse_decode"

    def spy(query, key, value, rows, rows_mask, dense, dense_mask, scaling, original=None):
        given.append((rows.dtype, rows_mask, dense_mask))
        return query

    monkeypatch.setattr(sparse, spy)
    inputs = build_prompt(model, processor, [PAGES[0]] * 2, [TEXTS[0]] * 2)
    with paper(keep_visual=0.1, focal_layers=[1], min_visual=0).attach(model):
        write(model, inputs, 3)
    assert given == [(torch.int32, None, None)] * len(given) and given


@pytest.mark.parametrize("pages", [1, 3])
def test_a_prompt_adds_few_operators_to_a_dense_one(intern, pages):
    """What is known of its pages is computed on the host, and goes to the device by one copy."""
    model, processor = intern
    inputs = build_prompt(model, processor, PAGES[:pages], TEXTS[:pages])
    method = paper(keep_visual=0.1, focal_layers=[1], min_visual=0)
    with growing_caches(model):
        dense, *_ = _steps(model, inputs)
    with method.attach(model):
        ours, *_ = _steps(model, inputs)
    # the ids of images, the tiles of each page, the guard's flags
    assert ours.total - dense.total <= 2 + pages and ours.waits == dense.waits
    layouts, meta = visual_layouts(model, inputs), torch.device("meta")
    with Counted() as counted:
        tokens = VisualTokens.of(layouts, inputs["input_ids"].shape[1], meta)
        make_policy(method, tokens, 4)
    padded = 0 if pages == 1 else 1  # which places of the fixations are padding
    assert counted.operators == {"_to_copy": 1 + padded, "zeros": 1}


def test_the_choice_of_a_focal_layer_and_its_list_are_one_kernel(intern, monkeypatch):
    model, processor = intern
    inputs = build_prompt(model, processor, PAGES[:3], TEXTS[:3])
    layouts, length = visual_layouts(model, inputs), inputs["input_ids"].shape[1]
    tokens = VisualTokens.of(layouts, length, torch.device("cpu"))
    policy = make_policy(paper(keep_visual=0.1, focal_layers=[1], min_visual=0), tokens, 4)
    calls = []
    monkeypatch.setattr(attention, "use_triton", lambda *args: True)
    monkeypatch.setattr(attention.topk, "top_rows", lambda *args: calls.append(args))
    for _ in range(2):  # the first step makes room for both
        policy.start_step()
        with Counted() as counted:
            assert policy.observe(1, torch.rand(3, length)) == 0
    assert set(counted.operators) == {"rand"} and len(calls) == 2
    fixation = policy.fixation(2)
    for *_, index, rows in calls:
        assert index is fixation.index and rows is fixation.listed


def test_a_step_adds_few_operators_to_a_dense_one(intern):
    model, processor = intern
    inputs = build_prompt(model, processor, PAGES[:1], TEXTS[:1])
    with growing_caches(model):
        dense = _steps(model, inputs)
    with paper(keep_visual=0.1, focal_layers=[1], min_visual=0).attach(model):
        ours = _steps(model, inputs)
    added = ours[-1].total - dense[-1].total
    assert added == ours[-2].total - dense[-2].total
    # three sparse layers in plain torch, a focal one, its choice, the counts: see the README
    assert added <= 45
