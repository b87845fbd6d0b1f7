"""DeepSeek-OCR: preprocessing equal to the original's, its folder layout, and bad input."""

import hashlib
import json
import re
import shutil
from itertools import groupby
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    UnlimitedOcrConfig,
    UnlimitedOcrForConditionalGeneration,
)

from builders.tiers import few
from compress.common.files import read_json, write_json
from compress.models.deepseek_ocr import load_deepseek_ocr, save_deepseek_ocr
from compress.models.deepseek_ocr_layout import native_config, original_config, weight_shapes
from compress.models.deepseek_ocr_processor import DeepseekOcrProcessor, load_processor
from compress.models.deepseek_ocr_views import (
    GRIDS,
    MODES,
    Mode,
    crop_grid,
    page_tokens,
    page_views,
)
from compress.models.visual import build_prompt, visual_layouts
from compress.models.vlm import load_vlm

GOLDEN = json.loads(
    (Path(__file__).parent / "golden" / "deepseek_ocr_preprocessing.json").read_text()
)["cases"]
TINY = Mode(256, 128)  # 4 visual tokens a side, crops 2


def _tokenizer():
    specials = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<image>"]
    words = [*specials, "?", *"\n abcdefghijklmnopqrstuvwxyzFROC."]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=specials[0],
        eos_token=specials[1],
        pad_token=specials[2],
        additional_special_tokens=["<image>"],
    )


@pytest.fixture(scope="module")
def processor():
    return DeepseekOcrProcessor(_tokenizer(), TINY)


@pytest.fixture(scope="module")
def model(processor):
    config = UnlimitedOcrConfig(
        text_config={
            "vocab_size": len(processor.tokenizer),
            "hidden_size": 16,
            "intermediate_size": 24,
            "moe_intermediate_size": 8,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "n_routed_experts": 4,
            "n_shared_experts": 2,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 512,
            # nothing as it is in the checkpoint, so that every setting has to travel
            "first_k_dense_replace": 2,
            "rms_norm_eps": 1e-2,
            "routed_scaling_factor": 1.5,
            "layer_types": ["full_attention"] * 3,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50.0},
            "pad_token_id": 2,
        },
        vision_config={
            "sam_config": {
                "hidden_size": 8,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": 128,
                "window_size": 3,
                "global_attn_indexes": [1],
                "output_channels": 6,
                "downsample_channels": [10, 12],
                "mlp_dim": 16,
            },
            "encoder_config": {
                "hidden_size": 12,
                "intermediate_size": 20,
                "num_hidden_layers": 2,
                "num_attention_heads": 3,
                "image_size": 28,
            },
        },
        image_token_id=processor.image_token_id,
    )
    torch.manual_seed(0)
    network = UnlimitedOcrForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in network.parameters():  # no zeros and no ones that could hide a swap
            parameter.normal_(0, 0.3)
    return network


@pytest.fixture(scope="module")
def folder(model, processor, tmp_path_factory):
    target = tmp_path_factory.mktemp("deepseek") / "DeepSeek-OCR"
    return save_deepseek_ocr(model, processor, target, largest_shard=20_000)


@pytest.fixture
def copy(folder, tmp_path):
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def _picture(width, height):
    y, x = np.arange(height)[:, None], np.arange(width)
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = x * 255 // width, y * 255 // height
    pixels[..., 2] = (x // 16 % 2 != y // 16 % 2) * np.uint8(255)
    return Image.fromarray(pixels)


PAGES = [_picture(100, 90), _picture(300, 200), _picture(90, 400)]  # no crops, 3x2, 2x8 -> 1x4
TEXTS = ["Free OCR.", "read", ""]


# ---- preprocessing -------------------------------------------------------------------------


def test_the_golden_table_has_20_sizes_and_every_kind_of_grid():
    assert len({tuple(case["size"]) for case in GOLDEN}) == 20
    assert len({tuple(case["modes"]["gundam"]["crops"]) for case in GOLDEN}) >= 10
    assert all(set(case["modes"]) == set(MODES) for case in GOLDEN)


@pytest.mark.parametrize("views_in", few(["half of the modes", "all modes"], "half of the modes"))
@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: "x".join(map(str, case["size"])))
def test_resize_pad_crops_and_tokens_are_the_original_s(processor, case, views_in):
    width, height = case["size"]
    number = GOLDEN.index(case)
    white = Image.new("RGB", (width, height), (255, 255, 255))
    views = {}  # by side, which two modes share
    for place, (name, expected) in enumerate(case["modes"].items()):
        mode = MODES[name]
        columns, rows = expected["crops"]
        grid = (columns, rows)
        assert (crop_grid(width, height, mode.crop) if mode.crop else (1, 1)) == grid
        # the order of the tokens, summed up and in full
        tokens = page_tokens(mode.side // 64, mode.crop // 64, grid)
        assert len(tokens) == expected["tokens"]
        assert _layout(tokens) == expected["layout"]
        assert _order(tokens, mode.crop // 64, columns) == expected["order"]
        tokens = DeepseekOcrProcessor(processor.tokenizer, mode).page_tokens(grid)
        assert len(tokens) == expected["tokens"]
        if views_in != "all modes" and (number + place) % 2:
            continue
        # the page within its square: what stayed white; everything else has the padding's colour
        if mode.side not in views:
            views[mode.side] = page_views(white, Mode(mode.side)).whole
        view = views[mode.side]
        inside = (view == 1).all(0)
        down, across = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
        assert [len(across), len(down)] == expected["resized"]
        assert [across[0], down[0]] == expected["offset"]
        assert len(across) * len(down) == inside.sum()
        grey = torch.tensor(127.0).div(255).sub(0.5).div(0.5)
        assert (view[:, ~inside] == grey).all()


def _layout(tokens):
    """[view, columns, rows], a run of equal rows each."""
    rows = []
    for _, group in groupby(tokens.tolist(), key=lambda token: token[:2]):
        view, row, column = list(group)[0]
        rows.append(("separator", 1) if row < 0 else (("global", "local")[view], None))
    lengths = [len(list(group)) for _, group in groupby(tokens.tolist(), key=lambda t: t[:2])]
    named = [(name, 1 if name == "separator" else n - 1) for (name, _), n in zip(rows, lengths)]  # noqa: B905
    return [[name, columns, len(list(group))] for (name, columns), group in groupby(named)]


def _order(tokens, crop, columns):
    """Hash of the order in the original's terms: number of the crop, row and column within it."""
    sequence = []
    for view, row, column in tokens.tolist():
        if row < 0:
            sequence.append([-1, -1, -1])
        elif column < 0:
            sequence.append([-2, -2, -2])
        elif view == 0:
            sequence.append([100, row, column])
        else:
            number = row // crop * columns + column // crop
            sequence.append([number, row % crop, column % crop])
    return hashlib.sha256(json.dumps(sequence, separators=(",", ":")).encode()).hexdigest()[:16]


@pytest.mark.parametrize("rest", few([False, True], False))  # by default each in one of the modes
@pytest.mark.parametrize("name", ["tiny", "gundam"])
def test_pixels_are_the_original_s(name, rest):
    cases = [case for case in GOLDEN if "means" in case["modes"][name]]
    assert len(cases) >= 10
    for number, case in enumerate(cases):
        if ((number % 4 == 0) == (name == "gundam")) == rest:
            continue
        views = page_views(_picture(*case["size"]), MODES[name])
        whole, expected = views.whole, case["modes"][name]
        crops = [] if views.crops is None else list(views.crops)
        assert [len(crops) > 0, views.grid] == [
            expected["crops"] != [1, 1],
            tuple(expected["crops"]),
        ]
        means = torch.stack([view.mean((1, 2)) for view in [whole, *crops]])
        torch.testing.assert_close(means, torch.tensor(expected["means"]), atol=1e-3, rtol=0)
        side = whole.shape[1]
        pixels = torch.stack([whole[:, 0, 0], whole[:, side // 2, side // 3]])
        torch.testing.assert_close(pixels, torch.tensor(expected["pixels"]), atol=0.02, rtol=0)


def test_the_order_of_equally_many_crops_decides_nothing():
    # the original sorts a set by the number of crops: within a number the order is the hash's
    for n in range(2, 10):
        peers = sorted(c / r for c, r in GRIDS if c * r == n)
        for low, high in zip(peers, peers[1:], strict=False):
            middle = (low + high) / 2
            assert any(abs(c / r - middle) < middle - low - 1e-9 for c, r in GRIDS)


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (640, 640), (641, 1)])
def test_extreme_pages(size):
    views = page_views(Image.new("L", size), MODES["gundam"])
    assert views.whole.shape == (3, 1024, 1024)
    columns, rows = views.grid
    assert (views.crops is None) == (columns * rows == 1)
    assert views.crops is None or len(views.crops) == columns * rows


# ---- processor -----------------------------------------------------------------------------


def test_prompt_is_beginning_image_newline_text(processor):
    inputs = processor(PAGES[:1], ["Free OCR. "])
    text = processor.tokenizer.encode("\nFree OCR.", add_special_tokens=False)
    assert inputs["input_ids"].tolist() == [[0, *[3] * (4 * 5 + 1), *text]]
    assert "pixel_values_local" not in inputs and inputs["num_local_patches"] == [0]


def test_batches_are_padded_on_the_left(processor):
    inputs = processor(PAGES, TEXTS)
    one_by_one = [processor([page], [text]) for page, text in zip(PAGES, TEXTS, strict=True)]
    for row, mask, alone in zip(
        inputs["input_ids"], inputs["attention_mask"], one_by_one, strict=True
    ):
        assert torch.equal(row[mask.bool()], alone["input_ids"][0])
        assert mask.tolist() == sorted(mask.tolist())
    assert inputs["num_local_patches"] == [0, 6, 4] and inputs["patches_grid"][1:] == [
        [3, 2],
        [1, 4],
    ]
    assert inputs["pixel_values_local"].shape == (10, 3, 128, 128)


def test_batch_equals_one_by_one(model, processor):
    with torch.no_grad():
        together = model(**processor(PAGES, TEXTS)).logits[:, -1]
        alone = torch.cat(
            [
                model(**processor([page], [text])).logits[:, -1]
                for page, text in zip(PAGES, TEXTS, strict=True)
            ]
        )
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_texts_and_images_come_in_pairs(processor):
    with pytest.raises(ValueError, match="got 1 images and 2 texts"):
        processor(PAGES[:1], ["a", "b"])


def test_tokenizer_without_image_token():
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    with pytest.raises(ValueError, match="<image>"):
        DeepseekOcrProcessor(bare)


# ---- layout of the features ----------------------------------------------------------------


def test_tokens_stand_where_the_network_puts_its_features(model, processor):
    inputs = processor(PAGES[1:2], ["read"])
    (layout,) = visual_layouts(model, inputs)
    with torch.no_grad():
        (features,) = model.get_image_features(
            inputs["pixel_values"],
            inputs["pixel_values_local"],
            inputs["num_local_patches"],
            inputs["patches_grid"],
        ).pooler_output
        core = model.model

        def encode(pixels):
            return core.multi_modal_projector(core.vision_tower(pixels).last_hidden_state)

        whole, crops = encode(inputs["pixel_values"]), encode(inputs["pixel_values_local"])
        for feature, (view, row, column) in zip(features, layout.grid.tolist(), strict=True):
            if row < 0:
                expected = core.view_separator
            elif column < 0:
                expected = core.image_newline
            elif view == 0:
                expected = whole[0, row * 4 + column]
            else:
                expected = crops[row // 2 * 3 + column // 2, row % 2 * 2 + column % 2]
            torch.testing.assert_close(feature, expected, atol=1e-5, rtol=1e-5)
    assert layout.on_page.sum() == 16 + 6 * 4


# ---- folder --------------------------------------------------------------------------------


def test_round_trip(model, processor, folder):
    loaded, its_processor = load_vlm(folder)
    inputs = processor(PAGES, TEXTS)
    again = its_processor(PAGES, TEXTS)
    assert torch.equal(inputs["input_ids"], again["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(**again).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5
        )
    state = model.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    tokens = loaded.generate(**again, max_new_tokens=3, do_sample=False)
    assert tokens.shape[1] == again["input_ids"].shape[1] + 3


def test_folder_has_the_checkpoint_s_layout(folder):
    config = read_json(folder / "config.json")
    assert config["architectures"] == ["DeepseekOCRForCausalLM"]
    assert config["model_type"] == "deepseek_vl_v2"
    keys = {"language_config", "projector_config", "vision_config", "candidate_resolutions"}
    assert keys <= set(config)
    index = read_json(folder / "model.safetensors.index.json")
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) > 2 and sorted(set(index["weight_map"].values())) == files
    assert files[0] == f"model-00001-of-{len(files):06d}.safetensors"
    # the kinds of names in the index of the real checkpoint, numbers left out
    kinds = {re.sub(r"\d+", "N", name) for name in index["weight_map"]}
    assert kinds == set(TENSOR_KINDS)


def test_full_size_has_as_many_tensors_as_the_checkpoint():
    config = native_config(REAL_CONFIG)
    # 2710 in the checkpoint, one of which (CLIP's own patch embedding) takes no part
    assert len(weight_shapes(config)) == 2709
    text, vision = config.text_config, config.vision_config
    assert (text.mlp_layer_types.count("dense"), text.num_hidden_layers) == (1, 12)
    assert set(text.layer_types) == {"full_attention"}
    assert (vision.sam_config.mlp_dim, vision.encoder_config.num_hidden_layers) == (3072, 24)


def test_config_of_full_size_survives_the_round_trip():
    written = original_config(native_config(REAL_CONFIG), torch.bfloat16)
    extra = {"rope_theta", "rms_norm_eps", "routed_scaling_factor", "tie_word_embeddings"}
    for path in ("", "language_config"):
        given, got = (part[path] if path else part for part in (REAL_CONFIG, written))
        assert {k: v for k, v in got.items() if k not in extra and k != "language_config"} == {
            k: v for k, v in given.items() if k not in extra and k != "language_config"
        }


def test_what_the_native_classes_do_not_compute_is_refused_at_once():
    with pytest.raises(ValueError, match="use_mla.*scoring_func.*projector_type"):
        native_config(
            {
                **REAL_CONFIG,
                "use_mla": True,
                "scoring_func": "sigmoid",
                "projector_config": {"projector_type": "mlp_gelu"},
            }
        )


def test_unlimited_ocr_is_not_saved_as_deepseek_ocr(model, processor, tmp_path):
    sliding = UnlimitedOcrConfig(text_config={**model.config.text_config.to_dict()})
    sliding.text_config.layer_types = ["reference_sliding_attention"] * 3
    with pytest.raises(ValueError, match="reference_sliding_attention"):
        original_config(sliding, torch.float32)


# ---- bad input -----------------------------------------------------------------------------


def test_corrupt_weights_are_named(copy):
    broken = sorted(copy.glob("*.safetensors"))[1]
    broken.write_bytes(broken.read_bytes()[:50])
    with pytest.raises(ValueError, match=broken.name):
        load_vlm(copy)


def test_missing_shard_is_named(copy):
    gone = sorted(copy.glob("*.safetensors"))[0]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=gone.name):
        load_vlm(copy)


def test_missing_tensor_is_named_as_in_the_checkpoint(copy):
    name = "model.layers.2.mlp.experts.2.up_proj.weight"
    index = read_json(copy / "model.safetensors.index.json")
    path = copy / index["weight_map"].pop(name)
    write_json(copy / "model.safetensors.index.json", index)
    save_file({k: v for k, v in load_file(path).items() if k != name}, path)
    with pytest.raises(ValueError, match=re.escape(name)):
        load_vlm(copy)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.2.mlp.experts.0.up_proj.weight"])
def test_tensor_of_another_shape_is_named(copy, name):
    index = read_json(copy / "model.safetensors.index.json")
    path = copy / index["weight_map"][name]
    save_file({**load_file(path), name: torch.zeros(3, 3)}, path)
    with pytest.raises(ValueError, match=rf"{re.escape(name)} should have shape .*\(3, 3\)"):
        load_vlm(copy)


def test_native_folders_are_checked_too(model, tmp_path, capfd):
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    kept = {name: tensor for name, tensor in weights.items() if name != "model.norm.weight"}
    save_file(kept, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing.*norm.weight"):
        load_vlm(tmp_path)
    save_file({**weights, "model.norm.weight": torch.zeros(3)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"norm.weight should have shape \(16,\).*\(3,\)"):
        load_vlm(tmp_path)
    expert = "model.layers.2.mlp.experts.0.up_proj.weight"
    save_file({**weights, expert: torch.zeros(3, 3)}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="weights fit its config.json but does not load"):
        load_vlm(tmp_path)
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(FileNotFoundError, match="should have a tokenizer.json"):
        load_vlm(tmp_path)
    assert "REPORT" not in capfd.readouterr().err  # one message, not a table beside it


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "processor_config.json"])
def test_corrupt_json_is_named(copy, name):
    (copy / name).write_text('{"model_type": ')
    with pytest.raises(ValueError, match=name):
        load_vlm(copy)


def test_broken_tokenizer_is_named(copy):
    (copy / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ValueError, match="tokenizer.json"):
        load_deepseek_ocr(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        load_deepseek_ocr(copy)


def test_unknown_mode_lists_the_known_ones(copy):
    settings = read_json(copy / "processor_config.json")
    assert load_processor(copy).mode == TINY
    write_json(copy / "processor_config.json", {**settings, "mode": "huge"})
    with pytest.raises(
        ValueError, match="'tiny', 'small', 'base', 'large' or 'gundam', got 'huge'"
    ):
        load_processor(copy)


def test_unknown_architecture_lists_the_known_ones(copy):
    write_json(copy / "config.json", {"model_type": "llama", "architectures": ["Llama"]})
    with pytest.raises(ValueError, match="'llama'.*qwen2_5_vl.*got_ocr2.*DeepseekOCRForCausalLM"):
        load_vlm(copy)


def test_folder_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_vlm(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="config.json"):
        load_vlm(tmp_path)


def test_image_without_pixels(model, processor):
    with pytest.raises(ValueError, match="0x9"):
        build_prompt(model, processor, [Image.new("RGB", (0, 9))], ["read"])


def test_what_is_no_image_at_all(model, processor):
    with pytest.raises(TypeError, match="got str"):
        build_prompt(model, processor, ["page.png"], ["read"])


# ---- facts of the real checkpoint ------------------------------------------------------------

LANGUAGE = {
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 1,
    "hidden_size": 1280,
    "intermediate_size": 6848,
    "kv_lora_rank": None,
    "lm_head": True,
    "max_position_embeddings": 8192,
    "moe_intermediate_size": 896,
    "n_group": 1,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_attention_heads": 10,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 12,
    "num_key_value_heads": 10,
    "q_lora_rank": None,
    "qk_nope_head_dim": 0,
    "qk_rope_head_dim": 0,
    "rm_head": False,
    "topk_group": 1,
    "topk_method": "greedy",
    "use_mla": False,
    "v_head_dim": 0,
    "vocab_size": 129280,
}
REAL_CONFIG = {
    "_name_or_path": "deepseek-ai/DeepSeek-OCR",
    "candidate_resolutions": [[1024, 1024]],
    "global_view_pos": "head",
    "architectures": ["DeepseekOCRForCausalLM"],
    "auto_map": {
        "AutoConfig": "modeling_deepseekocr.DeepseekOCRConfig",
        "AutoModel": "modeling_deepseekocr.DeepseekOCRForCausalLM",
    },
    "language_config": {
        "architectures": ["DeepseekV2ForCausalLM"],
        "torch_dtype": "bfloat16",
        **LANGUAGE,
    },
    "model_type": "deepseek_vl_v2",
    "projector_config": {
        "input_dim": 2048,
        "model_type": "mlp_projector",
        "n_embed": 1280,
        "projector_type": "linear",
    },
    "tile_tag": "2D",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.3",
    "vision_config": {
        "image_size": 1024,
        "mlp_ratio": 3.7362,
        "model_name": "deeplip_b_l",
        "model_type": "vision",
        "width": {
            "clip-l-14-224": {
                "heads": 16,
                "image_size": 224,
                "layers": 24,
                "patch_size": 14,
                "width": 1024,
            },
            "sam_vit_b": {
                "downsample_channels": [512, 1024],
                "global_attn_indexes": [2, 5, 8, 11],
                "heads": 12,
                "layers": 12,
                "width": 768,
            },
        },
    },
    **LANGUAGE,
}
_LAYER = "model.layers.N."
_SAM, _CLIP = "model.sam_model.", "model.vision_model."
_BLOCK, _TRANSFORMER = f"{_SAM}blocks.N.", f"{_CLIP}transformer.layers.N."
TENSOR_KINDS = [
    "lm_head.weight",
    "model.embed_tokens.weight",
    "model.image_newline",
    "model.view_seperator",
    "model.norm.weight",
    *[f"model.projector.layers.{kind}" for kind in ("weight", "bias")],
    *[f"{_LAYER}{name}_layernorm.weight" for name in ("input", "post_attention")],
    *[f"{_LAYER}self_attn.{part}_proj.weight" for part in "qkvo"],
    f"{_LAYER}mlp.gate.weight",
    *[
        f"{_LAYER}mlp.{where}{part}_proj.weight"
        for where in ("", "experts.N.", "shared_experts.")
        for part in ("gate", "up", "down")
    ],
    f"{_SAM}pos_embed",
    *[f"{_SAM}patch_embed.proj.{kind}" for kind in ("weight", "bias")],
    *[f"{_SAM}neck.N.{kind}" for kind in ("weight", "bias")],
    f"{_SAM}net_N.weight",
    *[f"{_BLOCK}attn.rel_pos_{axis}" for axis in "hw"],
    *[
        f"{_BLOCK}{name}.{kind}"
        for name in ("normN", "attn.qkv", "attn.proj", "mlp.linN")
        for kind in ("weight", "bias")
    ],
    f"{_CLIP}embeddings.class_embedding",
    f"{_CLIP}embeddings.patch_embedding.weight",
    f"{_CLIP}embeddings.position_embedding.weight",
    f"{_CLIP}embeddings.position_ids",
    *[f"{_CLIP}pre_layrnorm.{kind}" for kind in ("weight", "bias")],
    *[
        f"{_TRANSFORMER}{name}.{kind}"
        for name in ("layer_normN", "self_attn.qkv_proj", "self_attn.out_proj", "mlp.fcN")
        for kind in ("weight", "bias")
    ],
]
