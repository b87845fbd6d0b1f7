"""Adapters of the vision-language families, each on a tiny real model."""

import json

import pytest
import torch
from PIL import Image
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    DeepseekOcr2Config,
    DeepseekOcr2ForConditionalGeneration,
    DeepseekOcr2ImageProcessor,
    DeepseekOcr2Processor,
    Glm46VImageProcessor,
    Glm46VProcessor,
    Glm46VVideoProcessor,
    GlmOcrConfig,
    GlmOcrForConditionalGeneration,
    GotOcr2Config,
    GotOcr2ForConditionalGeneration,
    GotOcr2ImageProcessor,
    GotOcr2Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlamaConfig,
    PaddleOCRVLConfig,
    PaddleOCRVLForConditionalGeneration,
    PaddleOCRVLImageProcessor,
    PaddleOCRVLProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    UnlimitedOcrConfig,
    UnlimitedOcrForConditionalGeneration,
    UnlimitedOcrImageProcessor,
    UnlimitedOcrProcessor,
)
from transformers.models.got_ocr2.processing_got_ocr2 import GotOcr2ProcessorKwargs

from compress.models.deepseek_ocr_layout import QWEN_FIXED, SAM_FIXED, SAM_SIZES
from compress.models.deepseek_ocr_layout import TEXT as TEXT_SETTINGS
from compress.models.deepseek_ocr_processor import DeepseekOcrProcessor
from compress.models.deepseek_ocr_views import Mode
from compress.models.reading import read_pages
from compress.models.visual import (
    ADAPTERS,
    adapter_for,
    attention_modules,
    build_prompt,
    text_model,
    visual_layouts,
)
from compress.models.vlm import load_vlm

# transformers' GLM processor hands tensors to numpy.array
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

LETTERS = "\n abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.:"
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 2048,
}


def _tokenizer(*specials, **named):
    words = ["<pad>", "<s>", "</s>", "?", *specials, *LETTERS]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={**{f"special_{i}": s for i, s in enumerate(specials)}, **named},
    )


def _template(image):
    return (
        "{%- for message in messages -%}{%- for part in message.content -%}"
        f"{{%- if part.type == 'image' -%}}{{{{ '{image}' }}}}"
        "{%- else -%}{{ part.text }}{%- endif -%}{%- endfor -%}{%- endfor -%}"
    )


def _text(tokenizer, **more):
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return {"vocab_size": len(tokenizer), **TEXT, **ids, **more}


def _mrope(*sections):
    return {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": list(sections),
        }
    }


QWEN = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]
PIXELS = {"shortest_edge": 256, "longest_edge": 1 << 16}
PATCHES = {"patch_size": 8, "merge_size": 2, "size": PIXELS}


def _qwen_ids(tokenizer):
    names = ["vision_start_token_id", "image_token_id", "vision_end_token_id", "video_token_id"]
    return dict(zip(names, tokenizer.convert_tokens_to_ids(QWEN), strict=True))


def _qwen2_5_vl():
    tokenizer = _tokenizer(*QWEN)
    config = Qwen2_5_VLConfig(
        text_config=_text(tokenizer, **_mrope(2, 3, 3)),
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 8,
            "window_size": 32,
            "fullatt_block_indexes": [1],
            "out_hidden_size": 32,
        },
        **_qwen_ids(tokenizer),
    )
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(**PATCHES),
        tokenizer,
        Qwen2VLVideoProcessor(**PATCHES),
        chat_template=_template("<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config), processor


def _qwen3_vl():
    tokenizer = _tokenizer(*QWEN)
    config = Qwen3VLConfig(
        text_config=_text(tokenizer, head_dim=16, **_mrope(4, 2, 2)),
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "patch_size": 8,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0],
            "out_hidden_size": 32,
        },
        **_qwen_ids(tokenizer),
    )
    processor = Qwen3VLProcessor(
        Qwen2VLImageProcessor(**PATCHES),
        tokenizer,
        Qwen3VLVideoProcessor(**PATCHES),
        chat_template=_template("<|vision_start|><|image_pad|><|vision_end|>"),
    )
    return Qwen3VLForConditionalGeneration(config), processor


def _paddleocr_vl():
    tokenizer = _tokenizer("<start>", "<end>", "<video>", image_token="<image>")
    start, end, video, image = tokenizer.convert_tokens_to_ids(
        ["<start>", "<end>", "<video>", "<image>"]
    )
    config = PaddleOCRVLConfig(
        text_config=_text(tokenizer, head_dim=16, **_mrope(2, 3, 3)),
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 64,
            "patch_size": 8,
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    processor = PaddleOCRVLProcessor(
        PaddleOCRVLImageProcessor(**PATCHES),
        tokenizer,
        chat_template=_template("<start><image><end>"),
    )
    return PaddleOCRVLForConditionalGeneration(config), processor


def _glm_ocr():
    names = ["begin_of_image", "image", "end_of_image", "begin_of_video", "video", "end_of_video"]
    words = [f"<|{name}|>" for name in names]
    tokenizer = _tokenizer(*words)
    ids = tokenizer.convert_tokens_to_ids(words)
    config = GlmOcrConfig(
        text_config=_text(tokenizer, head_dim=16, **_mrope(2, 3, 3)),
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "image_size": 64,
            "patch_size": 8,
            "out_hidden_size": 32,
        },
        image_start_token_id=ids[0],
        image_token_id=ids[1],
        image_end_token_id=ids[2],
        video_start_token_id=ids[3],
        video_token_id=ids[4],
        video_end_token_id=ids[5],
    )
    processor = Glm46VProcessor(
        Glm46VImageProcessor(**PATCHES),
        tokenizer,
        Glm46VVideoProcessor(**PATCHES),
        chat_template=_template("<|begin_of_image|><|image|><|end_of_image|>"),
    )
    return GlmOcrForConditionalGeneration(config), processor


def _internvl():
    tokenizer = _tokenizer(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    config = InternVLConfig(
        text_config={"model_type": "qwen2", **_text(tokenizer)},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [64, 64],
            "patch_size": [8, 8],
            "layer_scale_init_value": 1.0,
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=16,
    )
    size = {"height": 64, "width": 64}
    processor = InternVLProcessor(
        GotOcr2ImageProcessor(size=size),
        tokenizer,
        InternVLVideoProcessor(size=size),
        image_seq_length=16,
        chat_template=_template("<IMG_CONTEXT>"),
    )
    return InternVLForConditionalGeneration(config), processor


def _got_ocr2():
    tokenizer = _tokenizer("<|im_start|>", "<|im_end|>", "<img>", "</img>", "<imgpad>")
    config = GotOcr2Config(
        text_config={"model_type": "qwen2", **_text(tokenizer)},
        vision_config={
            "hidden_size": 16,
            "output_channels": 8,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 256,
            "window_size": 4,
            "global_attn_indexes": [1],
            "mlp_dim": 24,
        },
        image_token_index=tokenizer.convert_tokens_to_ids("<imgpad>"),
        image_seq_length=16,
    )
    image_processor = GotOcr2ImageProcessor(size={"height": 256, "width": 256})
    processor = GotOcr2Processor(image_processor, tokenizer)
    processor.num_image_tokens = 16
    if "num_image_tokens" not in vars(GotOcr2Processor):  # below transformers 5.23
        GotOcr2ProcessorKwargs._defaults["images_kwargs"]["num_image_tokens"] = 16
    return GotOcr2ForConditionalGeneration(config), processor


def _sam():
    return {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 256,
        "window_size": 4,
        "global_attn_indexes": [1],
        "output_channels": 8,
        "downsample_channels": [8, 16],
        "mlp_dim": 24,
    }


def _experts(tokenizer):
    return _text(
        tokenizer,
        moe_intermediate_size=8,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        num_key_value_heads=2,
    )


def _unlimited(tokenizer, **attention):
    config = UnlimitedOcrConfig(
        text_config={**_experts(tokenizer), **attention},
        vision_config={
            "sam_config": _sam(),
            "encoder_config": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 56,
            },
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    return UnlimitedOcrForConditionalGeneration(config)


def _deepseek_ocr():
    tokenizer = _tokenizer("<image>")
    model = _unlimited(tokenizer, layer_types=["full_attention"] * 2)
    return model, DeepseekOcrProcessor(tokenizer, Mode(256, 128))


def _unlimited_ocr():
    tokenizer = _tokenizer("<image>")
    images = UnlimitedOcrImageProcessor(size={"height": 256, "width": 256}, tile_size=128)
    processor = UnlimitedOcrProcessor(images, tokenizer, chat_template=_template("<image>"))
    return _unlimited(tokenizer, sliding_window=8), processor


def _deepseek_ocr2():
    tokenizer = _tokenizer("<image>")
    config = DeepseekOcr2Config(
        text_config={**_experts(tokenizer), "mlp_layer_types": ["dense", "sparse"]},
        vision_config={
            "sam_config": {**_sam(), "image_size": 1024},
            "encoder_config": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
            },
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
    )
    processor = DeepseekOcr2Processor(
        DeepseekOcr2ImageProcessor(), tokenizer, chat_template=_template("<image>")
    )
    return DeepseekOcr2ForConditionalGeneration(config), processor


FAMILIES = {
    "deepseek_ocr": _deepseek_ocr,
    "unlimited_ocr": _unlimited_ocr,
    "deepseek_ocr2": _deepseek_ocr2,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "internvl": _internvl,
    "paddleocr_vl": _paddleocr_vl,
    "glm_ocr": _glm_ocr,
    "got_ocr2": _got_ocr2,
}


def _page(width, height, seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


PAGES = [_page(300, 200, 0), _page(128, 128, 1)]
TEXTS = ["OCR: ", "read all"]


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    torch.manual_seed(0)
    model, processor = FAMILIES[request.param]()
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
        page.paste(_page(width // columns, height // rows, 7), box)
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


def test_attention_modules_are_the_decoder_s(family):
    _, model, processor = family
    modules = attention_modules(model)
    assert [module.layer_idx for module in modules] == [0, 1]
    called = []
    hooks = [
        module.register_forward_hook(lambda module, *_: called.append(module.layer_idx))
        for module in modules
    ]
    with torch.no_grad():
        model(**build_prompt(model, processor, PAGES[1:], TEXTS[1:]))
    for hook in hooks:
        hook.remove()
    assert called == [0, 1]


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
    model, processor = _qwen2_5_vl()
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
    model, processor = _got_ocr2()
    inputs = processor(images=[_page(512, 256, 3)], crop_to_patches=True, return_tensors="pt")
    (layout,) = visual_layouts(model, inputs)
    assert layout.grid[:, 0].unique_consecutive().tolist() == [1, 2, 0]


def test_crops_of_deepseek_ocr2_come_before_the_page():
    model, processor = _deepseek_ocr2()
    inputs = build_prompt(model, processor, [_page(1600, 800, 4)], ["read"])
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
    found = read_pages(model, processor, PAGES, max_new_tokens=3)
    assert [r.new_tokens for r in found] == [3, 3] or all(r.ended for r in found)
    wanted = visual_layouts(model, build_prompt(model, processor, PAGES, TEXTS))
    assert [r.visual_tokens for r in found] == [len(layout.positions) for layout in wanted]
