"""The built-in DeepSeek-OCR reader: its architecture, its inputs, and its folder."""

import json

import numpy as np
import pytest
import torch

from builders.tiers import few
from compress import load_reader
from compress.data.pages import SQUARE_PAGE, page
from compress.models.builtin import reader_training, train_reader_deepseek
from compress.models.builtin.train_reader_deepseek import LEVELS, build_model, build_processor
from compress.models.reading import read_pages
from compress.models.visual import adapter_for, visual_layouts
from compress.models.vlm import load_vlm


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture(scope="module")
def model(processor):
    torch.manual_seed(0)
    return build_model(processor).eval()


def test_the_model_is_a_small_deepseek_ocr(model):
    assert adapter_for(model.config).name == "DeepSeek-OCR"
    text = model.config.text_config
    assert set(text.layer_types) == {"full_attention"}
    assert text.n_routed_experts > text.num_experts_per_tok > 1 and text.n_shared_experts == 1
    assert set(text.mlp_layer_types) == {"dense", "sparse"}
    parameters = sum(p.numel() for p in model.parameters())
    assert 1e6 < parameters < 4.9e6  # in float16 that is less than 10 MB


def test_a_page_of_the_last_level_has_enough_lines_and_visual_tokens(processor, model):
    assert LEVELS[-1].difficulty == SQUARE_PAGE and SQUARE_PAGE.lines[0] >= 12
    inputs = processor([page(0, 0, SQUARE_PAGE, "test").image], ["Free OCR."])
    layout = visual_layouts(model, inputs)[0]
    assert layout.on_page.sum() == 14 * 14 >= 100
    assert (~layout.on_page).sum() == 14 + 1  # a newline for each row, and a separator


def test_the_prompt_is_two_tokens(processor):
    ids = processor.tokenizer.encode("\nFree OCR.", add_special_tokens=False)
    assert processor.tokenizer.convert_ids_to_tokens(ids) == ["\n", "Free OCR."]
    assert processor.tokenizer.decode(ids) == "\nFree OCR."


@pytest.mark.parametrize("level", [0, 1, 2])
def test_labels_are_the_answer_and_its_end(processor, model, level):
    pages = [page(0, i, LEVELS[level].difficulty, "train") for i in range(3)]
    inputs = train_reader_deepseek.encode(processor, pages)
    tokenizer = processor.tokenizer
    for made, ids, labels in zip(pages, inputs["input_ids"], inputs["labels"], strict=True):
        asked = labels >= 0
        assert tokenizer.decode(ids[asked]) == made.text + tokenizer.eos_token
        assert torch.equal(ids[asked], labels[asked])
    with torch.no_grad():
        loss = model(**inputs).loss
        answers = (inputs["labels"] >= 0).sum(1)
        alone = [model(**train_reader_deepseek.encode(processor, [p])).loss for p in pages]
    mean = (torch.stack(alone) * answers).sum() / answers.sum()
    assert torch.allclose(loss, mean, rtol=1e-5)


@pytest.mark.parametrize("dtype", few([torch.bfloat16, torch.float16], torch.float16), ids=str)
def test_it_reads_in_half_precision(dtype):
    reader = load_reader("builtin:reader-deepseek", dtype=dtype)
    [reading] = reader.read([page(0, 0, SQUARE_PAGE, "validation").image], max_new_tokens=3)
    whole = load_reader("builtin:reader-deepseek").read(
        [page(0, 0, SQUARE_PAGE, "validation").image], max_new_tokens=3
    )
    assert reading.text and reading.text == whole[0].text


def test_saved_and_loaded_it_reads_the_same(processor, model, tmp_path):
    train_reader_deepseek.save(processor, model, tmp_path / "reader")
    config = json.loads((tmp_path / "reader" / "config.json").read_text())
    assert config["architectures"] == ["DeepseekOCRForCausalLM"]
    stored = sum(f.stat().st_size for f in (tmp_path / "reader").glob("*.safetensors"))
    assert stored <= 10_000_000
    loaded, again = load_vlm(tmp_path / "reader")
    inputs = train_reader_deepseek.encode(processor, [page(0, 0, SQUARE_PAGE, "validation")])
    with torch.no_grad():
        expected = reader_training.as_stored(model)(**inputs).logits
        assert torch.allclose(loaded(**inputs).logits, expected, atol=1e-5)
    images = [page(0, i, SQUARE_PAGE, "validation").image for i in range(2)]
    one = read_pages(loaded, again, images, max_new_tokens=4)
    assert again.mode == processor.mode
    assert [r.visual_tokens for r in one] == [14 * 14 + 14 + 1] * 2
    assert loaded.generation_config.max_new_tokens == train_reader_deepseek.MOST_NEW_TOKENS
    assert loaded.generation_config.eos_token_id == processor.tokenizer.eos_token_id


def test_positions_start_as_sines_that_survive_a_change_of_resolution(model):
    embeddings = model.model.vision_tower.vision_encoder.embeddings
    whole = train_reader_deepseek.sines(14, 14, 160)
    assert torch.equal(embeddings.position_embedding.weight[1:].view(14, 14, 160), whole)
    # rows and columns are told apart, each by its half of the width
    assert torch.equal(whole[3, 0, :80], whole[3, 9, :80])
    assert torch.equal(whole[0, 3, 80:], whole[9, 3, 80:])
    assert torch.allclose(whole[0, 1, 80], torch.tensor(1.0).sin())
    # at a third of the size most of the size is left; of random vectors a third would be
    smaller = embeddings.interpolate_pos_encoding(torch.zeros(1, 17, 160), 64, 64)[:, 1:]
    assert smaller.norm(dim=-1).mean() > 0.6 * whole.norm(dim=-1).mean()


def test_some_pages_have_holes_that_the_language_model_does_not_see(processor, model):
    pages = [page(0, i, SQUARE_PAGE, "train") for i in range(16)]
    inputs = train_reader_deepseek.encode(processor, pages)
    image = inputs["input_ids"] == processor.image_token_id
    seen = inputs["attention_mask"].bool()
    assert seen[~image].all()  # the prompt and the answer are whole
    grids = seen[image].view(16, -1)[:, :-1].view(16, 14, 15)
    assert seen[image].view(16, -1)[:, -1].all()  # the separator is
    tokens, newlines = grids[:, :, :-1], grids[:, :, -1]
    assert torch.equal(newlines, tokens.any(2))
    hidden = (~tokens).flatten(1).float().mean(1)
    assert (hidden == 0).any() and (hidden > 0.2).any()
    # of blank patches alone, or few of any: a page without much ink left is no page to learn from
    for made, shown, share in zip(pages, tokens, hidden, strict=True):
        grey = torch.tensor(np.asarray(made.image.convert("L"), int)).view(14, 16, 14, 16)
        inked = grey.amax((1, 3)) - grey.amin((1, 3)) > 100
        assert shown[inked].all() or share < 0.4


def test_hiding_a_token_is_leaving_it_out_of_the_sequence(processor, model):
    whole = train_reader_deepseek.encode(processor, [page(0, 0, SQUARE_PAGE, "train")])
    whole["attention_mask"] = torch.ones_like(whole["attention_mask"])
    whole["attention_mask"][:, 5:9] = 0
    kept = whole["attention_mask"][0].bool()
    with torch.no_grad():
        masked = model(**whole).logits[:, kept]
        features = model.model.get_image_features(whole["pixel_values"]).pooler_output
        embeds = model.get_input_embeddings()(whole["input_ids"])
        embeds[whole["input_ids"] == processor.image_token_id] = torch.cat(list(features))
        positions = torch.arange(kept.numel())[None, kept]
        short = model.model.language_model(
            inputs_embeds=embeds[:, kept],
            position_ids=positions,
            attention_mask=torch.ones(1, 1, int(kept.sum()), int(kept.sum())).tril().bool(),
            use_cache=False,
        )
        assert torch.allclose(masked, model.lm_head(short.last_hidden_state), atol=1e-5)


def test_the_loss_has_a_price_for_the_length_of_visual_tokens(processor, model):
    inputs = train_reader_deepseek.encode(processor, [page(0, 0, LEVELS[0].difficulty, "train")])
    with torch.no_grad():
        found = train_reader_deepseek.loss(model, inputs)
        tokens = model.model.get_image_features(inputs["pixel_values"]).pooler_output[0]
        assert len(tokens) == 7  # two rows of two with a newline each, and the separator
        mean = tokens[[0, 1, 3, 4]].norm(dim=-1).mean()
        wanted = model(**inputs).loss + train_reader_deepseek.NORM_WEIGHT * mean
    assert mean > 0.1
    torch.testing.assert_close(found, wanted)
    assert not model.model.multi_modal_projector._forward_hooks
