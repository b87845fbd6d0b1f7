"""Adapters of the vision-language families, each on a tiny real model."""

import json

import pytest
import torch
from PIL import Image
from transformers import (
    LlamaConfig,
)

from builders import vlm
from builders.tiers import few
from builders.vlm import FAMILIES, PAGES, TEXTS
from compress.models.deepseek_ocr_layout import QWEN_FIXED, SAM_FIXED, SAM_SIZES
from compress.models.deepseek_ocr_layout import TEXT as TEXT_SETTINGS
from compress.models.reading import read_pages
from compress.models.visual import (
    ADAPTERS,
    adapter_for,
    build_prompt,
    text_model,
    visual_layouts,
)
from compress.models.vlm import load_vlm

# transformers' GLM processor hands tensors to numpy.array
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    model, processor = vlm.build(request.param)
    with torch.no_grad():
        for parameter in model.parameters():  # no zeros: every path carries something
            parameter.normal_(0, 0.1) if parameter.ndim > 1 else parameter.add_(0.01)
    return request.param, model.eval(), processor


def _embeddings(model, inputs):
    """What the text model is given, ``(batch, length, dim)``."""
    seen = []
    hook = text_model(model).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        hook.remove()
    return seen[0]


def test_every_adapter_is_tested():
    assert set(FAMILIES) == set(ADAPTERS)


def test_the_adapter_is_the_family_s(family):
    name, model, _ = family
    assert adapter_for(model.config) is ADAPTERS[name]


def test_layout_covers_the_image_tokens(family):
    _, model, processor = family
    inputs = build_prompt(model, processor, PAGES, TEXTS)
    layouts = visual_layouts(model, inputs)
    places = inputs["input_ids"] == model.config.image_token_id
    for row, layout in zip(places, layouts, strict=True):
        assert torch.equal(layout.positions, row.nonzero()[:, 0])
        assert len(layout.grid) == len(layout.image_of) == len(layout.positions) > 4
        assert set(layout.image_of.tolist()) == {0}
        # no place of a view twice, and no gap in a view
        places_on_page = [tuple(cell) for cell in layout.grid[layout.on_page].tolist()]
        assert len(set(places_on_page)) == len(places_on_page)
        for view in {cell[0] for cell in places_on_page}:
            rows = [cell[1] for cell in places_on_page if cell[0] == view]
            columns = [cell[2] for cell in places_on_page if cell[0] == view]
            assert (max(rows) + 1) * (max(columns) + 1) == len(rows)
        assert {cell[0] for cell in places_on_page} >= {0}


def test_tokens_are_counted_from_the_size_of_a_page_alone(family):
    _, model, processor = family
    for page in (*PAGES, vlm.page(900, 300, 2), vlm.page(150, 420, 3)):
        layout = visual_layouts(model, build_prompt(model, processor, [page], TEXTS[:1]))[0]
        assert adapter_for(model.config).tokens(processor, *page.size) == len(layout.positions)


def test_prompt_is_padded_on_the_left_and_ends_in_the_text(family):
    _, model, processor = family
    inputs = build_prompt(model, processor, PAGES, TEXTS)
    for mask in inputs["attention_mask"]:
        assert mask.tolist() == sorted(mask.tolist())
    decoded = processor.tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True)
    for text, shown in zip(TEXTS, decoded, strict=True):
        assert text.strip().replace(" ", "") in shown.replace(" ", "")


def test_a_change_on_the_page_shows_where_the_layout_says(family):
    name, model, processor = family
    if name == "deepseek_ocr2":
        pytest.skip("its visual tokens are queries: their order is not that of the page")
    padded = name in ("deepseek_ocr", "unlimited_ocr")  # to a square, here of 4x4 cells
    width, height = 256, 256 if padded else 160
    plain = Image.new("RGB", (width, height), (128, 128, 128))
    before = build_prompt(model, processor, [plain], ["read"])
    (layout,) = visual_layouts(model, before)
    embeddings = _embeddings(model, before)[0][layout.positions]
    cells = layout.grid
    whole = layout.on_page & (cells[:, 0] == 0)
    rows, columns = int(cells[whole, 1].max()) + 1, int(cells[whole, 2].max()) + 1
    for row, column in [(0, 0), (1, 2), (rows - 1, 1)]:
        page = plain.copy()
        box = [column * width // columns, row * height // rows]
        page.paste(vlm.page(width // columns, height // rows, 7), box)
        after = build_prompt(model, processor, [page], ["read"])
        moved = (_embeddings(model, after)[0][layout.positions] - embeddings).norm(dim=1)
        _, found_row, found_column = cells[whole][moved[whole].argmax()].tolist()
        # two convolutions of stride 2 smear an eighth of this small page over the neighbours
        slack = int(padded)
        assert max(abs(found_row - row), abs(found_column - column)) <= slack
        mosaic = layout.on_page & (cells[:, 0] == 1)
        if padded:  # crops are encoded apart: no other one changes
            half = cells[mosaic][moved[mosaic] > 1e-4, 1:] // 2
            assert half.unique(dim=0).tolist() == [[2 * row // rows, 2 * column // columns]]


def test_text_and_visual_tokens_reach_the_text_model(family):
    _, model, processor = family
    inputs = build_prompt(model, processor, PAGES, TEXTS)
    embeddings = _embeddings(model, inputs)
    assert embeddings.shape[:2] == inputs["input_ids"].shape
    plain = model.get_input_embeddings()(inputs["input_ids"])
    places = inputs["input_ids"] == model.config.image_token_id
    assert torch.equal(embeddings[~places], plain[~places])
    assert not torch.isclose(embeddings[places], plain[places]).all(dim=1).any()


def test_three_tokens_are_generated(family):
    _, model, processor = family
    inputs = build_prompt(model, processor, PAGES, TEXTS)
    output = model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert output.shape == (2, inputs["input_ids"].shape[1] + 3)


def test_prompt_without_image_has_an_empty_layout(family):
    _, model, processor = family
    ids = processor.tokenizer("abc", return_tensors="pt")
    (layout,) = visual_layouts(model, {**ids})
    assert len(layout.positions) == len(layout.grid) == len(layout.image_of) == 0


def test_inputs_that_do_not_belong_together(family):
    _, model, processor = family
    inputs = dict(build_prompt(model, processor, PAGES[:1], TEXTS[:1]))
    places = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][0, places[-1]] = 0
    with pytest.raises(ValueError, match="tokens"):
        visual_layouts(model, inputs)


def test_two_images_in_one_sequence():
    model, processor = vlm.build("qwen2_5_vl")
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    inputs = processor(
        images=[PAGES[0], PAGES[1], PAGES[1]],
        text=[f"{image}and{image}", image],
        padding=True,
        padding_side="left",
        return_tensors="pt",
    )
    both, one = visual_layouts(model, inputs)
    assert both.image_of.unique_consecutive().tolist() == [0, 1]
    assert torch.equal(both.grid[both.image_of == 1], one.grid)
    assert set(one.image_of.tolist()) == {0}


def test_crops_of_got_ocr2_are_views_of_their_own():
    model, processor = vlm.build("got_ocr2")
    inputs = processor(images=[vlm.page(512, 256, 3)], crop_to_patches=True, return_tensors="pt")
    (layout,) = visual_layouts(model, inputs)
    assert layout.grid[:, 0].unique_consecutive().tolist() == [1, 2, 0]


def test_crops_of_deepseek_ocr2_come_before_the_page():
    model, processor = vlm.build("deepseek_ocr2")
    inputs = build_prompt(model, processor, [vlm.page(1600, 800, 4)], ["read"])
    (layout,) = visual_layouts(model, inputs)
    views = [1] * 144 + [2] * 144 + [0] * 257  # 12x12 queries a crop, 16x16 the page, separator
    assert layout.grid[:, 0].tolist() == views
    assert layout.grid[-1].tolist() == [0, -1, -1] and layout.on_page.sum() == len(views) - 1


def test_unknown_architecture_lists_the_known_ones():
    with pytest.raises(ValueError, match="'llama'.*deepseek_ocr, unlimited_ocr.*got_ocr2"):
        adapter_for(LlamaConfig())


def test_one_text_per_image(family):
    _, model, processor = family
    with pytest.raises(ValueError, match="got 2 images and 1 texts"):
        build_prompt(model, processor, PAGES, TEXTS[:1])


@pytest.mark.parametrize(
    "family", few(FAMILIES, "qwen2_5_vl", "unlimited_ocr", "deepseek_ocr2"), indirect=True
)
def test_a_saved_folder_of_every_family_loads_and_reads_the_same(family, tmp_path):
    name, model, processor = family
    if name == "deepseek_ocr":
        pytest.skip("its folder has a layout of its own; see test_deepseek_ocr.py")
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, again = load_vlm(tmp_path)
    inputs = build_prompt(model, processor, PAGES[:1], TEXTS[:1])
    if name != "got_ocr2":  # transformers does not store how its images are cut
        others = build_prompt(loaded, again, PAGES[:1], TEXTS[:1])
        assert torch.equal(inputs["input_ids"], others["input_ids"])
    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.allclose(loaded(**inputs).logits, expected, atol=1e-5)
    if name == "deepseek_ocr2":  # the published checkpoint's own config.json
        text, vision = model.config.text_config, model.config.vision_config
        language = {name: getattr(text, name) for name in TEXT_SETTINGS}
        encoder = {n: getattr(vision.encoder_config, n) for n in QWEN_FIXED}
        sam = {n: getattr(vision.sam_config, ours) for n, (ours, _) in SAM_SIZES.items()}
        sam |= {n: getattr(vision.sam_config, n) for n in SAM_FIXED}
        config = {
            "architectures": ["DeepseekOCR2ForCausalLM"],
            "model_type": "deepseek_vl_v2",
            "language_config": {**language, "first_k_dense_replace": 1, "use_mla": False},
            "projector_config": {"projector_type": "linear"},
            "vision_config": {
                "image_size": 1024,
                "width": {
                    "sam_vit_b": sam,
                    "qwen2-0-5b": {"dim": vision.encoder_config.hidden_size, **encoder},
                },
            },
        }
        model.config.vision_config.encoder_config.rope_parameters["rope_theta"] = 1e6
        (tmp_path / "config.json").write_text(json.dumps(config))
        theirs, processor_2 = load_vlm(tmp_path)
        again_2 = build_prompt(theirs, processor_2, PAGES[:1], TEXTS[:1])
        assert torch.equal(again_2["input_ids"], inputs["input_ids"])
        same = type(model)(model.config).eval()  # with the published encoder's angles
        same.load_state_dict(model.state_dict())
        with torch.no_grad():
            expected = same(**inputs).logits
            assert torch.allclose(theirs(**inputs).logits, expected, atol=1e-5)
    if name == "unlimited_ocr":  # the first revision of the published checkpoint
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "unlimited-ocr"}))
        older, _ = load_vlm(tmp_path)
        with torch.no_grad():
            assert torch.allclose(older(**inputs).logits, expected, atol=1e-5)


def test_every_family_reads_a_page(family):
    _, model, processor = family
    result = read_pages(model, processor, PAGES, max_new_tokens=3)
    assert [r.new_tokens for r in result] == [3, 3] or all(r.ended for r in result)
    expected = visual_layouts(model, build_prompt(model, processor, PAGES, TEXTS))
    assert [r.visual_tokens for r in result] == [len(layout.positions) for layout in expected]
