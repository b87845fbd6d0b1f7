"""From a recipe to a finished folder: what a run leaves, what it refuses, and what it never breaks.

Runs that must die or need a disk of their own are those of tests/programs/interrupted.py.
"""

import errno
import fcntl
import json
import shutil
import signal
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from accelerate import tracking
from accelerate.tracking import GeneralTracker, on_main_process
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from builders import pipelines, programs
from builders.events import finish
from builders.tiers import few
from compress.api import apply
from compress.checkpoints.facts import verify
from compress.checkpoints.load import load
from compress.common.output_folder import MARKER, not_ours
from compress.data.sources import load_images
from compress.eval.metrics import DIFFUSION
from compress.eval.sampling import sample
from compress.methods.gradflow import GradFlow, OneShot
from compress.methods.gradflow.train import PruningRun
from compress.methods.training import Training
from compress.models.locate import locate
from compress.models.objective import validation_loss
from compress.runs import diffusion
from compress.runs.forecast import dry_run
from compress.runs.recipe import Recipe, load_recipe
from compress.runs.run import run_events

pytestmark = pytest.mark.usefixtures("quick_runs")

FLOW, RECOVER = 4, 2
SAMPLES, SEEDS = 16, 2


def tiny_pipeline() -> DDPMPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(**pipelines.PIXEL_UNET)
    return DDPMPipeline(unet=unet, scheduler=DDPMScheduler(num_train_timesteps=100))


def settings(model: Path, **changes) -> dict:
    recipe = {
        "model": str(model),
        "data": "builtin:digits",
        "method": {
            "name": "gradflow",
            "keep_macs": 0.3,
            "steps": FLOW,
            "update_every": 1,
            "criterion_every": 2,
            "criterion_batches": 1,
            "max_move": 0.8,
            "settle": 0.25,
        },
        "recover": {"steps": RECOVER, "batch": 4},
        "train": {"save_every": 2},
        "evaluate": {"samples": SAMPLES, "steps": 2, "sampling_seeds": SEEDS},
        "seed": 3,
    }
    for section, values in changes.items():
        recipe[section] = recipe[section] | values if isinstance(values, dict) else values
    return recipe


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_pipeline().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    (folder / "LICENSE").write_text("Do as you like.")
    return folder


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """One run from beginning to end, with its events."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COMPRESS_CACHE", str(folder / "cache"))
        patch.chdir(folder)
        recipe = Recipe.model_validate(settings(model))
        events, result = finish(run_events(recipe, output=folder / "run", device="cpu"))
    return folder, result, events


@pytest.fixture(scope="module")
def driven(model, finished, tmp_path_factory):
    """What the driver's children left."""
    folder = tmp_path_factory.mktemp("driven")
    (folder / "recipe.json").write_text(json.dumps(settings(model)))
    cache = str(finished[0] / "cache")
    programs.run("interrupted", "recipe.json", cwd=folder, mounts=True, COMPRESS_CACHE=cache)
    return folder, json.loads((folder / "done.json").read_text())


def tree(folder: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


# ---- what a finished run leaves ------------------------------------------------------------


def test_a_finished_run_has_all_its_files_and_nothing_else(finished):
    folder, result, _ = finished
    assert result.folder == folder / "run" and result.checkpoint == folder / "run" / "checkpoint"
    names = {p.name for p in result.folder.iterdir()}
    expected = {"recipe.yaml", "metrics.json", "report.html", "log.jsonl", "checkpoint"}
    expected |= {"trace.safetensors", "samples.safetensors", "figures", MARKER}
    assert names == expected and not_ours(result.folder) == []
    figures = [p.name for p in (result.folder / "figures").iterdir()]
    assert figures and all(name.endswith(".png") for name in figures), figures
    # nothing beside it either, but the cache
    assert {p.name for p in folder.iterdir()} == {"run", "cache"}
    assert not [p for p in folder.rglob("*") if p.suffix in {".bin", ".pt", ".pkl", ".pth"}]


def test_metrics_follow_the_schema(finished):
    folder, result, _ = finished
    metrics = json.loads((folder / "run" / "metrics.json").read_text(encoding="utf8"))
    assert metrics == json.loads(json.dumps(result.metrics, allow_nan=False))
    assert {"run", "widths", "metrics", "floor"} <= set(metrics)
    facts = metrics["run"]
    wanted = {"method", "seed", "created", "device", "threads", "versions", "train_seconds"}
    wanted |= {"criterion_seconds", "criterion_share", "optimiser_steps", "returned_channels"}
    assert wanted <= set(facts)
    assert (facts["seed"], facts["threads"], facts["device"]) == (3, 1, "cpu")
    assert facts["optimiser_steps"] == FLOW + RECOVER
    assert facts["method"]["name"] == "gradflow" and facts["method"]["keep_macs"] == 0.3
    assert facts["versions"]["torch"] == torch.__version__.partition("+")[0]
    level = "block_out_channels[{}]"
    assert metrics["widths"] == [
        {"level": level.format(0), "dense": 8, "compressed": 4},
        {"level": level.format(1), "dense": 16, "compressed": 8},
    ]
    assert set(metrics["floor"]) == {"fid_digits", "kid_digits"}
    distances = ("fid", "kid", "is", "precision", "recall")
    others = {f"{name}{of}" for name in distances for of in ("", "_emoji")} | {"class_accuracy"}
    assert set(metrics["metrics"]) == set(DIFFUSION) - others
    for name, entry in metrics["metrics"].items():
        assert set(entry) == {"dense", "compressed", "ratio", "better", "unit", "how"}
        assert entry["better"] in ("lower", "higher") and entry["how"] and entry["unit"]
        for side in ("dense", "compressed"):
            value, interval = entry[side]["value"], entry[side]["ci95"]
            assert entry[side]["n"] >= 1
            if interval is not None:
                assert interval[0] <= value <= interval[1] or name in ("precision", "recall")
        if entry["dense"]["value"] > 0:
            share = entry["compressed"]["value"] / entry["dense"]["value"]
            assert entry["ratio"] == pytest.approx(share)


def test_params_macs_and_validation_loss_are_those_of_the_saved_checkpoint(finished, model):
    _, result, _ = finished
    table = result.metrics["metrics"]
    data = load_images("builtin:digits", 16, 1)
    images = torch.stack([data.held_out[i] for i in range(diffusion.VALIDATION_LIMIT)])
    for side, pipeline in (
        ("dense", DDPMPipeline.from_pretrained(model)),
        ("compressed", DDPMPipeline.from_pretrained(result.checkpoint)),
    ):
        unet = pipeline.unet.eval()
        assert table["params"][side]["value"] == sum(p.numel() for p in unet.parameters())
        with (
            sdpa_kernel(SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
            torch.no_grad(),
        ):
            unet(torch.zeros(1, 1, 16, 16), 0)
        # torch's counter leaves out nothing here but counts two operations per MAC
        assert table["macs"][side]["value"] == counter.get_total_flops() / 2
        loss = validation_loss(lambda x, t, u=unet: u(x, t).sample, images, pipeline.scheduler)
        assert table["validation_loss"][side]["value"] == pytest.approx(loss, rel=1e-4)
    assert 0.27 <= table["macs"]["ratio"] <= 0.3


def test_shown_samples_are_pairs_from_the_same_noise(finished, model):
    folder, result, _ = finished
    shown = load_file(folder / "run" / "samples.safetensors")
    assert set(shown) == {"dense", "compressed"}
    for name, where in (("dense", model), ("compressed", result.checkpoint)):
        assert shown[name].shape == (SAMPLES * SEEDS, 1, 16, 16)
        assert shown[name].dtype == torch.uint8
        again = sample(
            DDPMPipeline.from_pretrained(where), count=4, steps=2, sampler="ddim", seed=0
        )
        difference = (shown[name][:4].int() - again.int()).abs()
        assert difference.max() <= 1  # rounding, with another number of threads


def test_the_checkpoint_says_where_it_comes_from(finished, model):
    _, result, _ = finished
    facts = verify(result.checkpoint)
    assert facts["base_model"] == str(model)
    assert facts["base_hash"] == locate(model).hash
    assert facts["recipe"]["method"]["keep_macs"] == 0.3 and facts["recipe"]["seed"] == 3
    assert facts["widths"] == result.metrics["widths"]
    assert facts["metrics"] == json.loads(json.dumps(result.metrics["metrics"]))
    assert tuple(load(result.checkpoint).unet.config.block_out_channels) == (4, 8)
    card = (result.checkpoint / "README.md").read_text()
    assert "license: mit" in card.split("---\n")[1]
    assert "Licence of the base model: mit; see LICENSE" in card
    assert (result.checkpoint / "LICENSE").read_text() == "Do as you like."


def test_the_written_recipe_is_the_recipe_with_its_versions(finished, model):
    folder, _, _ = finished
    path = folder / "run" / "recipe.yaml"
    again = load_recipe(path).model_dump(exclude={"output"})
    assert again == Recipe.model_validate(settings(model)).model_dump(exclude={"output"})
    assert f"# torch {torch.__version__.partition('+')[0]}" in path.read_text()


def test_events_come_in_the_order_of_the_stages(finished):
    _, _, events = finished
    order = ["prepare", "flow", "recover", "evaluate", "report", "done"]
    assert sorted((e.stage for e in events), key=order.index) == [e.stage for e in events]
    assert {e.stage for e in events} == set(order)
    evaluated = [(e.step, e.total) for e in events if e.stage == "evaluate"]
    assert evaluated == [(k + 1, 2 * SEEDS) for k in range(2 * SEEDS)]
    assert "(8, 16) -> (4, 8)" in events[0].message and str(FLOW + RECOVER) in events[0].message


# ---- prediction, and compression in memory -------------------------------------------------


def test_a_dry_run_predicts_what_the_run_makes_and_writes_nothing(
    finished, model, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    before = tree(model)
    plan = dry_run(Recipe.model_validate(settings(model, output=str(tmp_path / "o"))), device="cpu")
    assert plan["problems"] == []
    table = finished[1].metrics["metrics"]
    for name in ("params", "macs"):
        (text,) = plan[name]
        numbers = [int(part.replace(",", "")) for part in text.split("->")]
        assert numbers == [table[name][side]["value"] for side in ("dense", "compressed")]
    assert plan["keep_macs"] == pytest.approx(table["macs"]["ratio"], abs=1e-4)
    assert plan["optimiser_steps"] == FLOW + RECOVER
    assert plan["widths"] == ["(8, 16) -> (4, 8)"]
    assert list(tmp_path.iterdir()) == [] and tree(model) == before


def test_a_dry_run_lists_problems(finished, model):
    plan = dry_run(Recipe.model_validate(settings(model, method={"keep_macs": 0.01})))
    assert "keep_macs must be at least" in plan["problems"][0]
    used = str(finished[0] / "run")
    plan = dry_run(Recipe.model_validate(settings(model, output=used)))
    assert "finished run" in plan["problems"][0]
    assert dry_run("no-such-recipe")["problems"]


def test_apply_leaves_the_pipeline_as_it_was(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipeline = tiny_pipeline()
    unet = pipeline.unet.train()
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    config = dict(unet.config)
    compressed = apply(
        pipeline,
        OneShot(keep_macs=0.3, steps=0, criterion="magnitude"),
        data="builtin:digits",
        training=Training(steps=2, batch=4),
        device="cpu",
    )
    assert pipeline.unet is unet and unet.training and dict(unet.config) == config
    assert all(torch.equal(before[key], value) for key, value in unet.state_dict().items())
    assert compressed.model is not pipeline and type(compressed.model) is DDPMPipeline
    assert tuple(compressed.model.unet.config.block_out_channels) == (4, 8)
    assert compressed.report["optimiser_steps"] == 2
    assert compressed.report["method"]["criterion"] == "magnitude"
    assert [w["compressed"] for w in compressed.report["widths"]] == [4, 8]
    assert list(tmp_path.iterdir()) == []
    folder = compressed.save(tmp_path / "checkpoint")
    noise = torch.randn(2, 1, 16, 16)
    with torch.no_grad():
        outputs = [p.unet.eval()(noise, 5).sample for p in (load(folder), compressed.model)]
    assert torch.equal(*outputs)


def test_apply_takes_any_data_set_of_images():
    images = torch.rand(21, 1, 16, 16) * 2 - 1
    compressed = apply(
        tiny_pipeline(),
        GradFlow(keep_macs=0.3, steps=2, update_every=1, max_move=0.6, criterion_batches=1),
        data=images,
        training=Training(steps=0, batch=2),
        device="cpu",
    )
    assert compressed.report["optimiser_steps"] == 2


# ---- folders that are in use ---------------------------------------------------------------


def begin(model: Path, output: Path, stage: str = "flow", recipe: dict | None = None, **options):
    """Enter a run until its first event of a stage, and leave it there."""
    typed = Recipe.model_validate(recipe or settings(model))
    events = run_events(typed, output=output, device="cpu", **options)
    for event in events:
        if event.stage == stage:
            break
    events.close()
    return event


@pytest.fixture(scope="module")
def left(model, tmp_path_factory):
    """A run that was left in its recovery."""
    folder = tmp_path_factory.mktemp("left") / "run"
    begin(model, folder, "recover")
    return folder


@pytest.fixture
def unfinished(left, tmp_path):
    return shutil.copytree(left, tmp_path / "run")


@pytest.fixture
def used(finished, tmp_path):
    return shutil.copytree(finished[0] / "run", tmp_path / "used")


def test_a_finished_run_is_not_touched_without_overwrite(model, used):
    before = tree(used)
    with pytest.raises(FileExistsError, match="finished run.*--overwrite"):
        begin(model, used)
    with pytest.raises(ValueError, match="seed changed"):
        begin(model, used, recipe=settings(model, seed=4), resume=True)
    assert tree(used) == before


@pytest.mark.parametrize("linked", [False, True])
def test_a_run_killed_after_its_report_is_finished(model, finished, used, tmp_path, linked):
    before = tree(used)
    states = tmp_path / "elsewhere" if linked else used / "state"
    states.mkdir()
    for name in ("state.safetensors", ".state.safetensors.a1b2c3d4.compress-tmp"):
        (states / name).write_text("left")
    if linked:
        (used / "state").symlink_to(states)
    for name in (".lock", ".report.html.a1b2c3d4.compress-tmp"):
        (used / name).touch()
    events, result = finish(
        run_events(Recipe.model_validate(settings(model)), output=used, resume=True, device="cpu")
    )
    assert [(e.stage, e.message.partition(";")[0]) for e in events] == [
        ("done", "already finished")
    ]
    assert result.metrics == json.loads(json.dumps(finished[1].metrics))
    assert tree(used) == before and states.exists() == linked


def test_overwrite_starts_from_nothing(model, used):
    begin(model, used, overwrite=True)
    assert {p.name for p in used.iterdir()} <= {MARKER, "recipe.yaml", "log.jsonl", "state"}
    rows = [json.loads(line) for line in (used / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["stage"] == "flow"] == [1]


@pytest.mark.parametrize(
    "recipe",
    [{"method": {"keep_macs": 0.01}}, {"data": "folder:/nowhere"}, {"model": "/nowhere"}],
)
def test_overwrite_with_a_recipe_that_cannot_run_keeps_the_old_run(model, used, recipe):
    before = tree(used)
    with pytest.raises((ValueError, FileNotFoundError)):
        changes = {key: value for key, value in recipe.items() if key != "model"}
        changed = settings(recipe.get("model", model), **changes)
        begin(model, used, recipe=changed, overwrite=True)
    assert tree(used) == before


@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"resume": True}])
def test_a_folder_that_is_no_run_is_never_touched(model, tmp_path, options):
    (tmp_path / "photos" / "2024").mkdir(parents=True)
    (tmp_path / "photos" / "2024" / "a.jpg").write_bytes(b"precious")
    before = tree(tmp_path)
    with pytest.raises(FileExistsError, match="no run of compress"):
        begin(model, tmp_path / "photos", **options)
    assert tree(tmp_path) == before


def test_a_file_is_no_folder(model, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="which is a file"):
        begin(model, tmp_path / "file", overwrite=True)


def test_an_unfinished_run_asks_for_resume_and_goes_on(model, tmp_path):
    output = tmp_path / "run"
    typed = Recipe.model_validate(settings(model))
    events = run_events(typed, output=output, device="cpu")
    for event in events:
        if event.stage == "flow" and event.step == 3:
            break
    # nobody else gets in while it runs
    with pytest.raises(FileExistsError, match="in use by another process"):
        begin(model, output, resume=True)
    events.close()
    before = tree(output)
    with pytest.raises(FileExistsError, match="unfinished run; go on with --resume"):
        begin(model, output)
    assert tree(output) == before
    assert begin(model, output, resume=True).step == 3  # the state of step 2 was the last
    assert begin(model, output, overwrite=True).step == 1


@pytest.mark.parametrize(
    "changes",
    few(
        [{"method": {"keep_macs": 0.5}}, {"method": {"criterion": "random"}}, {"seed": 4}],
        {"method": {"keep_macs": 0.5}},
    ),
    ids=["widths", "criterion", "seed"],
)
def test_resume_with_another_recipe_is_refused(model, unfinished, changes):
    before = tree(unfinished)
    # half a run of each recipe is a run of neither
    with pytest.raises(ValueError, match="recipe"):
        begin(model, unfinished, "recover", recipe=settings(model, **changes), resume=True)
    assert tree(unfinished) == before


@pytest.mark.parametrize("options", [{"resume": True}, {"overwrite": True}])
def test_a_folder_that_another_process_holds_is_refused(model, unfinished, options):
    with (unfinished / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        before = tree(unfinished)
        with pytest.raises(FileExistsError, match="in use by another process"):
            begin(model, unfinished, **options)
        assert tree(unfinished) == before


def test_a_lock_that_a_dead_process_left_is_no_lock(model, unfinished):
    (unfinished / ".lock").touch()
    assert begin(model, unfinished, "recover", resume=True).stage == "recover"


class Notebook(GeneralTracker):
    """A tracker that needs a folder, as tensorboard does."""

    name = "notebook"
    requires_logging_directory = True
    seen: ClassVar[list[tuple[str, int, set[str]]]] = []

    @on_main_process
    def __init__(self, run_name: str, logging_dir: str, **kwargs) -> None:
        super().__init__()
        self.folder = str(logging_dir)

    @property
    def tracker(self) -> None:
        return None

    @on_main_process
    def store_init_configuration(self, values: dict) -> None:
        pass

    @on_main_process
    def log(self, values: dict, step: int, **kwargs) -> None:
        self.seen.append((self.folder, step, set(values)))


def test_a_tracker_gets_every_step_in_the_folder_of_the_run(model, tmp_path, monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "notebook", Notebook)
    monkeypatch.setattr(Notebook, "seen", [])
    output = tmp_path / "run"
    begin(model, output, "recover", recipe=settings(model, train={"trackers": ["notebook"]}))
    where = str(output / "trackers")
    assert Notebook.seen == [(where, step + 1, {"loss", "lr"}) for step in range(FLOW + 1)]


# ---- failures ------------------------------------------------------------------------------


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    model, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        diffusion.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6)
    )
    with pytest.raises(OSError, match="MB are needed in .*, 1 MB are free") as caught:
        begin(model, tmp_path / "above" / "run")
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_enough_space_is_asked_for(model, tmp_path, monkeypatch):
    asked = []
    real = shutil.disk_usage
    monkeypatch.setattr(diffusion.shutil, "disk_usage", lambda p: asked.append(p) or real(p))
    output = tmp_path / "above" / "run"
    most = 0
    events = run_events(Recipe.model_validate(settings(model)), output=output, device="cpu")
    for event in events:
        if event.stage == "evaluate":
            break
        state = output / "state" / "state.safetensors"
        most = max(most, state.stat().st_size if state.exists() else 0)
    events.close()
    assert asked == [tmp_path]
    # the state lies there twice while it is replaced
    params = sum(p.numel() for p in tiny_pipeline().unet.parameters())
    assert 0 < 2 * most <= 9 * 4 * params + 2**22


@pytest.mark.parametrize("existed", [False, True])
def test_a_failure_before_any_state_leaves_no_new_folder(model, tmp_path, monkeypatch, existed):
    output = tmp_path / "run"
    if existed:
        output.mkdir()

    def broken(self):
        yield from ()
        raise OSError(errno.EIO, "the disk broke")

    monkeypatch.setattr(PruningRun, "events", broken)
    with pytest.raises(OSError, match="the disk broke"):
        begin(model, output)
    assert output.exists() == existed
    assert not (output / ".lock").exists()


def test_a_failure_later_keeps_the_state(model, tmp_path, monkeypatch):
    output = tmp_path / "run"

    def broken(*_):
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(diffusion.DiffusionRun, "measure", broken)
        with pytest.raises(RuntimeError, match="no memory") as caught:
            begin(model, output, "never")
    [note] = caught.value.__notes__
    assert f"compress eval {output / 'checkpoint'} --data builtin:digits" in note
    assert (output / "state" / "state.safetensors").exists() and not (output / ".lock").exists()
    assert verify(output / "checkpoint")["metrics"] == {}
    assert tuple(load(output / "checkpoint").unet.config.block_out_channels) == (4, 8)
    # what was not used yet may change; what was may not
    with pytest.raises(ValueError, match=r"method changed; go on with: compress run .* --resume"):
        begin(model, output, recipe=settings(model, method={"steps": 6}), resume=True)
    changes = {"evaluate": {"samples": 4}, "train": {"save_every": 3, "keep_states": 1}}
    recipe = Recipe.model_validate(settings(model, **changes))
    events, result = finish(run_events(recipe, output=output, resume=True, device="cpu"))
    assert [e.stage for e in events if e.stage in ("flow", "recover")] == []
    assert result.metrics["metrics"]["ssim_to_dense"]["compressed"]["n"] == 4 * SEEDS
    assert verify(output / "checkpoint")["metrics"]["ssim_to_dense"]
    with pytest.raises(ValueError, match="evaluate changed"):
        begin(model, output, recipe=settings(model), resume=True)


def test_killed_after_training_it_ends_with_the_same_weights(driven, finished):
    """In the evaluation, the export, the figures and the report."""
    folder, done = driven
    assert done["codes"]["evaluated"] == [*[-signal.SIGKILL] * 4, 0]
    assert done["codes"]["write_bytes"] == done["codes"]["write_text"] == [True, False]
    found = json.loads((folder / "evaluated.json").read_text())
    assert "error" not in found, found
    weights = [
        load_file(where / "checkpoint" / "unet" / "diffusion_pytorch_model.safetensors")
        for where in (folder / "evaluated", finished[0] / "run")
    ]
    assert list(weights[0]) == list(weights[1])
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])
    verify(folder / "evaluated" / "checkpoint")
    metrics = json.loads((folder / "evaluated" / "metrics.json").read_text())["metrics"]
    for name, entry in finished[1].metrics["metrics"].items():
        if name not in ("latency_ms", "images_per_second", "peak_memory_mb"):
            for side in ("dense", "compressed"):
                assert metrics[name][side]["value"] == pytest.approx(entry[side]["value"], rel=1e-6)


def test_nothing_half_written_stays_in_the_resumed_run(driven, finished):
    folder, _ = driven
    names = [
        sorted(p.name for p in where.iterdir())
        for where in (folder / "evaluated", finished[0] / "run")
    ]
    assert names[0] == names[1]


def test_dense_samples_are_drawn_once(driven, finished):
    folder, _ = driven
    stages = json.loads((folder / "evaluated.json").read_text())["stages"]
    # the model is the one of the finished run, whose samples lie in the cache by its hash
    drawn = [(step, total) for stage, step, total in stages if stage == "evaluate"]
    assert drawn == [(k + 1, SEEDS) for k in range(SEEDS)]
    assert len(list((finished[0] / "cache" / "samples").iterdir())) == 1


@pytest.mark.parametrize("option", ["resume", "overwrite"])
def test_a_run_killed_while_its_first_file_is_written_can_go_on(driven, option):
    folder, done = driven
    assert done["codes"]["fresh"] == [-signal.SIGKILL]
    assert not (folder / "fresh" / "recipe.yaml").exists()
    assert json.loads((folder / f"enter {option}.json").read_text()) == {"stages": ["flow"]}


def outcome(driven, name: str) -> tuple[dict, list[str]]:
    folder, done = driven
    if done["mounts"][name]:
        pytest.skip(f"mounting a tmpfs is not permitted here: {done['mounts'][name].strip()}")
    return json.loads((folder / f"{name}.json").read_text()), done["mounts"][f"left in {name}"]


def test_a_disk_that_fills_before_the_first_state_leaves_nothing(driven):
    found, left = outcome(driven, "state")
    assert "OSError" in found["error"] and "No space left on device" in found["message"]
    assert left == ["ballast"]


def test_a_disk_that_fills_at_the_end_keeps_the_state_and_nothing_half_written(driven):
    found, left = outcome(driven, "checkpoint")
    assert "OSError" in found["error"], found
    assert "space" in found["message"].lower() and "\n" not in found["message"]
    assert left == [
        "ballast",
        "run",
        "run/.compress",
        "run/checkpoint",
        *(
            f"run/checkpoint/{name}"
            for name in ("LICENSE", "README.md", "compress.json", "model_index.json")
        ),
        "run/checkpoint/scheduler",
        "run/checkpoint/scheduler/scheduler_config.json",
        "run/checkpoint/unet",
        "run/checkpoint/unet/config.json",
        "run/checkpoint/unet/diffusion_pytorch_model.safetensors",
        "run/log.jsonl",
        "run/recipe.yaml",
        "run/state",
        "run/state/state-1.safetensors",
        "run/state/state.safetensors",
        "run/trace.safetensors",
    ]


def test_a_place_that_cannot_be_written_is_one_clear_message(driven):
    found, left = outcome(driven, "read-only")
    assert "OSError" in found["error"] and "Read-only file system" in found["message"]
    assert left == []
