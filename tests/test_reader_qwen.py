"""The built-in reader's architecture, its processor, and its training: laws, on real classes."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoProcessor, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from compress.common.journal import Journal
from compress.data.page_text import ALPHABET
from compress.data.pages import LINE, PAGE, Difficulty, page
from compress.models.builtin import reader_training, train_reader_qwen
from compress.models.builtin.reader_training import LEVELS, Level, Plan, Progress, Reader, Trainer
from compress.models.builtin.train_reader_qwen import PROMPT, build_model, build_processor

SMALL = Difficulty((64, 32), (1, 1), (2, 4), (14, 14), margin=(4, 4))
TINY = (Level(SMALL, 4), Level(replace(SMALL, size=(64, 64), lines=(2, 2)), 4))


@pytest.fixture(scope="module")
def processor():
    return build_processor()


@pytest.fixture
def model(processor):
    return build_model(processor)


def tiny_model(processor):
    """The same classes, in which a step takes no time."""
    config = build_model(processor).config.to_dict()
    config["text_config"] |= {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "layer_types": None,
        "rope_parameters": config["text_config"]["rope_parameters"]
        | {"mrope_section": [0, 1, 1] * 4},
    }
    config["vision_config"] |= {
        "depth": 2,
        "hidden_size": 24,
        "intermediate_size": 32,
        "out_hidden_size": 32,
    }
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))
    model.generation_config = build_model(processor).generation_config
    return model


@pytest.fixture
def trainer(processor):
    """Makes trainers of one seed."""

    def make(folder=None, **changes):
        torch.manual_seed(0)
        ways = (getattr(train_reader_qwen, name) for name in ("encode", "read", "save"))
        reader = Reader(tiny_model(processor), *(partial(way, processor) for way in ways))
        plan = replace(Plan(levels=TINY, warmup=2, final=4, every=3, pages=4), **changes)
        return Trainer(reader, plan, Journal(folder))

    return make


# ---- architecture --------------------------------------------------------------------------


def test_the_model_has_the_size_that_was_asked_for(model):
    assert model.config.text_config.num_hidden_layers >= 8
    parameters = sum(p.numel() for p in model.parameters())
    assert 1e6 < parameters <= 5e6  # in float16 that is at most 10 MB


def test_a_page_of_the_last_level_has_enough_lines_and_visual_tokens(processor):
    assert LEVELS[-1].difficulty == PAGE and PAGE.lines[0] >= 12
    inputs = train_reader_qwen.encode(processor, [page(0, 0, PAGE, "test")])
    assert inputs["mm_token_type_ids"].sum() == 13 * 24 >= 300
    assert inputs["image_grid_thw"].tolist() == [[1, 48, 26]]


def test_no_level_is_resized(processor):
    for level in LEVELS:
        width, height = level.difficulty.size
        inputs = train_reader_qwen.encode(processor, [page(0, 0, level.difficulty, "train")])
        assert inputs["image_grid_thw"].tolist() == [[1, height // 8, width // 8]]


def test_rows_and_columns_take_turns_at_the_frequencies(model):
    rotary = model.model.language_model.rotary_emb
    at = torch.zeros(3, 1, 1)
    angles = {}
    for axis, name in enumerate(("time", "row", "column")):
        moved = at.clone()
        moved[axis] = 1
        _, sin = rotary(torch.zeros(1), moved)
        angles[name] = torch.asin(sin[0, 0, :16])
    assert angles["time"].abs().max() == 0
    expected = 1000 ** -(torch.arange(16) / 16)
    assert torch.allclose(angles["row"][::2], expected[::2])
    assert torch.allclose(angles["column"][1::2], expected[1::2])
    assert angles["row"][1::2].abs().max() == angles["column"][::2].abs().max() == 0


# ---- tokenizer and processor ---------------------------------------------------------------


def test_a_character_is_a_token_and_comes_back(processor):
    tokenizer = processor.tokenizer
    text = f"# {ALPHABET}\n\n <table><tr><td>a1</td></tr></table>  x\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(ALPHABET) + 2 + 2 + 1 + 6 + 2 + 2 + 1 + 1
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text
    assert tokenizer("a~b")["input_ids"][1] == tokenizer.unk_token_id


def test_the_chat_template_gives_the_prompt(processor):
    question = {"role": "user", "content": [{"type": "image"}]}
    assert processor.apply_chat_template([question]) == PROMPT
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Read."}]}
    assert processor.apply_chat_template([asked]) == PROMPT


def test_labels_are_the_answer_and_its_end(processor):
    pages = [page(0, i, LINE, "train") for i in range(6)]
    inputs = train_reader_qwen.encode(processor, pages)
    assert len({len(p.text) for p in pages}) > 1, "the batch should need padding"
    for made, ids, labels in zip(pages, inputs["input_ids"], inputs["labels"], strict=True):
        asked = labels >= 0
        assert processor.tokenizer.decode(ids[asked]) == made.text + "<|im_end|>"
        assert torch.equal(ids[asked], labels[asked])


def test_padding_on_the_right_changes_nothing(processor, model):
    pages = [page(0, i, LINE, "train") for i in range(4)]
    together = train_reader_qwen.encode(processor, pages)
    loss = model(**together).loss
    answers = (together["labels"] >= 0).sum(1)
    single = [model(**train_reader_qwen.encode(processor, [p])).loss for p in pages]
    mean = (torch.stack(single) * answers).sum() / answers.sum()
    assert torch.allclose(loss, mean, rtol=1e-5)


def test_reading_a_batch_of_two_sizes_is_reading_one_by_one(processor, model):
    model.generation_config.max_new_tokens = 6
    model.generation_config.eos_token_id = None
    pages = [page(0, 0, TINY[0].difficulty, "train"), page(0, 1, TINY[1].difficulty, "train")]
    # far from the initial weights, so that the texts depend on the pages
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    model.eval()
    together = train_reader_qwen.read(processor, model, pages)
    assert together == [train_reader_qwen.read(processor, model, [p])[0] for p in pages]
    assert together[0] != together[1]


def test_greedy_reading_follows_the_logits_of_a_forward_without_cache(processor, model):
    model.generation_config.max_new_tokens = 5
    model.eval()
    made = page(0, 0, SMALL, "train")
    text = train_reader_qwen.read(processor, model, [made])[0]
    inputs = train_reader_qwen.encode(processor, [replace(made, text=text)])
    asked = (inputs["labels"][0] >= 0).nonzero().flatten()[:5]
    logits = model(**inputs).logits[0]
    assert torch.equal(logits[asked - 1].argmax(-1), inputs["input_ids"][0, asked])


def test_saved_and_loaded_it_gives_the_same_logits(processor, model, tmp_path):
    train_reader_qwen.save(processor, model, tmp_path / "reader")
    files = {path.name for path in (tmp_path / "reader").iterdir()}
    assert {"config.json", "tokenizer.json", "processor_config.json"} <= files
    assert {f for f in files if f.endswith((".bin", ".pt", ".pkl"))} == set()
    weights = tmp_path / "reader" / "model.safetensors"
    assert weights.stat().st_size <= 10_000_000
    with safe_open(weights, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}
    loaded, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path / "reader", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    pages = [page(0, i, LINE, "train") for i in range(3)]
    stored = reader_training.as_stored(model)
    again = AutoProcessor.from_pretrained(tmp_path / "reader")
    assert type(again) is type(processor) and again.chat_template == processor.chat_template
    inputs = train_reader_qwen.encode(again, pages)
    expected = train_reader_qwen.encode(processor, pages)
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(**inputs).logits, stored(**inputs).logits)
        assert not torch.equal(model.eval()(**inputs).logits, stored(**inputs).logits)
    assert loaded.generation_config.eos_token_id == processor.tokenizer.eos_token_id


# ---- training ------------------------------------------------------------------------------


def test_a_few_steps_lower_the_loss(trainer):
    training = trainer(levels=TINY[:1], final=40, lr=1e-2)
    pages = [page(0, i, SMALL, "validation") for i in range(16)]

    def loss():
        with torch.no_grad():
            return training.model(**training.reader.encode(pages)).loss.item()

    before = loss()
    for _ in range(20):
        training.step()
    # 4.6 is the log of the vocabulary; to know that an answer is short and lower case gains 1
    assert before > 4 and loss() < before - 1


def test_a_resumed_run_is_the_uninterrupted_one(trainer, tmp_path, monkeypatch):
    # the second level begins at step 4 whatever the loss is
    monkeypatch.setattr(Progress, "ready", lambda self: self.level_steps >= 4)
    folders = tmp_path / "whole", tmp_path / "parts"
    for folder in folders:
        folder.mkdir()
    whole = trainer(folders[0])
    whole.run(save_every=1e9, publish=lambda model: None)
    parts = trainer(folders[1])
    for _ in range(5):
        parts.step()
    parts.save()
    parts.step()  # lost by the kill, and with it this row of the log
    parts.journal.log(event="lost")
    torch.manual_seed(7)
    parts = trainer(folders[1])
    with torch.no_grad():
        for parameter in parts.model.parameters():
            parameter.zero_()
    parts.resume()
    assert vars(parts.progress)["step"] == 5 and parts.progress.level == 1
    parts.run(save_every=1e9, publish=lambda model: None)
    for one, two in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(one, two)
        states = [
            [optimizer.state[p] for optimizer in t.optimizers if p in optimizer.state]
            for t, p in ((whole, one), (parts, two))
        ]
        assert len(states[0]) == len(states[1]) == 1 and states[0][0].keys() == states[1][0].keys()
        for key, value in states[0][0].items():
            assert torch.equal(value, states[1][0][key])
    assert whole.progress == parts.progress and whole.progress.step == 8
    # the evaluation at step 3 is not part of the second run, which only took steps until then
    log = [row for row in whole.journal.rows if row["step"] > 3]
    assert [row["event"] for row in log] == ["level", "evaluation", "evaluation"]
    assert parts.journal.rows == log
    assert not [f for f in tmp_path.rglob("*") if f.suffix in (".pt", ".bin", ".pkl")]


def test_every_weight_has_one_optimizer_and_muon_takes_the_matrices(trainer):
    training = trainer(lr=1.0, warmup=1)
    names = {id(p): name for name, p in training.model.named_parameters()}
    groups = [group for o in training.optimizers for group in o.param_groups]
    found = [names[id(p)] for group in groups for p in group["params"]]
    assert sorted(found) == sorted(names.values())
    muon = {names[id(p)] for p in training.optimizers[1].param_groups[0]["params"]}
    assert all("proj" in name or "mlp" in name or "qkv" in name for name in muon)
    assert not any("embed" in name for name in muon)
    training.step()
    rates = {group["lr"] for group in groups}
    assert rates == {1.0, reader_training.STACKS}


def test_what_reads_better_is_published_as_stored(trainer, monkeypatch):
    training = trainer(levels=TINY[:1], final=4, every=1)
    rates = iter([0.9, 0.5, 0.7, 0.4])
    monkeypatch.setattr(Trainer, "evaluate", lambda self, model: next(rates))
    published = []
    training.run(save_every=1e9, publish=lambda m: published.append((training.progress.step, m)))
    assert [step for step, _ in published] == [1, 2, 4]
    last = published[-1][1]
    for stored, trained in zip(last.parameters(), training.model.parameters(), strict=True):
        assert torch.equal(stored, trained.half().float())
    assert training.progress.step == 4 and training.done


def test_character_error_rate_of_an_evaluation(trainer):
    training = trainer()
    seen = []

    def read(model, pages):
        seen.extend(pages)
        return [p.text[:-1] if i % 2 else p.text for i, p in enumerate(pages)]

    training.reader = replace(training.reader, read=read)
    rate = training.evaluate(training.model)
    assert rate == pytest.approx(2 / sum(len(p.text) for p in seen))
    assert [p.text for p in seen] == [page(0, i, SMALL, "validation").text for i in range(4)]


def test_a_level_begins_when_the_running_loss_is_low(trainer):
    progress = Progress(level_steps=50)
    assert not progress.ready()
    progress.seen(1.0)
    progress.seen(0.0)
    assert progress.running == pytest.approx(0.95) and not progress.ready()
    progress.running = reader_training.RAISE_BELOW - 0.01
    assert progress.ready()
    assert not replace(progress, level_steps=49).ready()
    training = trainer()
    training.progress = Progress(step=60, level_steps=60, running=0.2)
    training.plan = replace(training.plan, levels=(replace(TINY[0], batch=1), TINY[1]))
    # one batch of loss 4.6 weighs 5%: the mean becomes 0.42
    training.step()
    assert training.progress.level == 0
    training.progress.running = -1.0
    training.step()
    assert training.progress == Progress(step=62, level=1)


def test_batches_are_functions_of_seed_and_step_and_a_fifth_is_easier():
    plan = Plan(levels=tuple(Level(SMALL, 1) for _ in range(4)))
    levels = [plan.draw(Progress(step=k, level=3))[0] for k in range(1000)]
    easier = [level for level in levels if level != 3]
    # four standard errors of a share of 0.2 among 1000 are 0.05
    assert len(easier) / 1000 == pytest.approx(0.2, abs=0.05)
    assert {levels.count(level) > 40 for level in range(3)} == {True}
    texts = [plan.draw(Progress(step=k))[1][0].text for k in range(50)]
    assert texts == [plan.draw(Progress(step=k))[1][0].text for k in range(50)]
    assert len(set(texts)) > 40
    other = replace(plan, seed=1)
    assert texts != [other.draw(Progress(step=k))[1][0].text for k in range(50)]


def test_the_learning_rate_warms_up_and_falls_on_the_last_level_only():
    plan = Plan(lr=1.0, warmup=10, final=100, levels=TINY)
    rates = [plan.learning_rate(Progress(step=k)) for k in range(20)]
    assert rates == pytest.approx([min(1, (k + 1) / 10) for k in range(20)])
    last = [plan.learning_rate(Progress(step=500, level=1, level_steps=k)) for k in (0, 50, 99)]
    assert last == pytest.approx([1.0, 0.5, 0.01])
    assert plan.learning_rate(Progress(step=500, level=0, level_steps=90)) == 1


def test_the_script_leaves_a_model_with_its_log(tmp_path, monkeypatch):
    run, output = tmp_path / "run", tmp_path / "run" / "model"
    monkeypatch.setattr(train_reader_qwen, "build_model", tiny_model)
    arguments = ["train.py", "--run", str(run), "--final", "2"]
    monkeypatch.setattr("sys.argv", arguments)
    monkeypatch.setattr(Trainer, "evaluate", lambda self, model: 0.5)
    reader_training.train("", train_reader_qwen.build, TINY[:1])
    log = (output / "train.jsonl").read_text()
    assert log == (run / "log.jsonl").read_text() and '"cer": 0.5' in log
    assert (output / "model.safetensors").is_file()


def test_a_stored_reader_is_polished_on_the_last_level(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "evaluate", lambda self, model: 0.5)
    first, second = tmp_path / "a" / "model", tmp_path / "b" / "model"
    monkeypatch.setattr(train_reader_qwen, "build_model", tiny_model)
    command = ["train.py", "--final", "2", "--lr", "0", "--run"]
    monkeypatch.setattr("sys.argv", [*command, str(tmp_path / "a")])
    reader_training.train("", train_reader_qwen.build, TINY[:1])
    begun = (first / "train.jsonl").read_text()
    assert begun.splitlines()[-1].startswith('{"event": "evaluation", "step": 2')
    # it reads better now, or nothing would be published
    monkeypatch.setattr(Trainer, "evaluate", lambda self, model: 0.25)
    monkeypatch.setattr("sys.argv", [*command, str(tmp_path / "b"), "--polish", str(first)])
    torch.manual_seed(5)
    reader_training.train("", train_reader_qwen.build, TINY)
    rows = [json.loads(line) for line in (second / "train.jsonl").read_text().splitlines()]
    assert (second / "train.jsonl").read_text().startswith(begun)
    assert [(r["event"], r["step"], r["level"]) for r in rows[-2:]] == [
        ("polish", 2, 1),
        ("evaluation", 4, 1),
    ]
    one, other = (load_file(folder / "model.safetensors") for folder in (first, second))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_the_script_refuses_to_write_into_an_old_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train_reader_qwen.py", "--run", str(tmp_path)])
    with pytest.raises(SystemExit):
        reader_training.train("", train_reader_qwen.build, TINY)
    assert "exists; give --resume" in capsys.readouterr().err
    (tmp_path / "log.jsonl").write_text("mine")
    monkeypatch.setattr("sys.argv", ["train_reader_qwen.py", "--run", str(tmp_path), "--resume"])
    with pytest.raises(FileExistsError, match="lacks the marker"):
        reader_training.train("", train_reader_qwen.build, TINY)
    assert (tmp_path / "log.jsonl").read_text() == "mine"
