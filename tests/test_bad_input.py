"""Bad input to real runs: one clear message, a non-zero exit, nothing half-written."""

import errno
import fcntl
import json
import os
import shlex
import shutil
from importlib import resources
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from builders import programs
from builders.tiers import few
from compress.cli import app
from compress.common.output_folder import claim

pytestmark = pytest.mark.usefixtures("quick_runs")

BUILTIN = Path(str(resources.files("compress.models.builtin"))) / "ddpm-digits"
# the shortest run there is, for the mistakes that show late
SHORT = [
    "--set=method={name: oneshot, criterion: magnitude, keep_macs: 0.5, steps: 0}",
    "--set=recover.steps=1",
    "--set=recover.batch=2",
    "--set=recover.distill=0",
    "--set=evaluate={samples: 16, steps: 1, sampling_seeds: 1}",
]


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """Run, expect exit code 2 with one message on stderr, and see that nothing was written."""
    monkeypatch.chdir(tmp_path)

    def refused(*arguments) -> str:
        before = sorted(tmp_path.rglob("*"))
        result = CliRunner().invoke(app, ["run", "ddpm_gradflow", *map(str, arguments)])
        assert result.exit_code == 2, result.output
        assert result.exception is None or isinstance(result.exception, SystemExit)
        assert result.stdout == ""
        assert result.stderr.count("error: ") == 1 and "Traceback" not in result.stderr
        assert sorted(tmp_path.rglob("*")) == before
        return result.stderr

    return refused


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(BUILTIN, folder)
    return folder


def test_unknown_key(refused):
    assert "nearest known key: method.keep_macs" in refused("--set=method.keep_mac=0.5")


def test_negative_keep(refused):
    assert "greater than 0" in refused("--set=method.keep_macs=-0.5")


def test_keep_macs_below_what_group_norm_allows(refused):
    assert "keep_macs" in refused("--set=method.keep_macs=0.0001")


def test_missing_model_folder(refused):
    assert "nowhere" in refused("--set=model=./nowhere")


def test_unknown_built_in_model(refused):
    assert "ddpm-digits" in refused("--set=model=builtin:ddpm-digit")


def test_corrupt_safetensors(refused, model):
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert weights.name in refused(f"--set=model={model}")


def test_a_pickled_checkpoint_is_not_opened(refused, model):
    weights = model / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    assert "safetensors" in refused(f"--set=model={model}")


@pytest.mark.parametrize("dry", few([[], ["--dry-run"]], []))
def test_what_could_not_be_measured(tmp_path, monkeypatch, dry):
    """Refused before the first step, with a way out that works."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path / "hub"))

    def offline(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    for name, count in (("few", 30), ("some", 31)):
        (tmp_path / name).mkdir()
        for k in range(count):
            Image.new("L", (16, 16), k).save(tmp_path / name / f"{k}.png")

    def run(*changes):
        sets = [f"--set={change}" for change in changes]
        result = CliRunner().invoke(app, ["run", "ddpm_gradflow", *SHORT, *sets, *dry])
        assert result.exit_code == 2, result.output
        assert "Traceback" not in result.output and not (tmp_path / "runs").exists()
        return result.output

    told = "folder:few has 30 images, 3 of them held out; give 31 or more, or name other metrics"
    assert told in run("data=folder:few")
    told = "no network"
    assert told in run("data=folder:some", "evaluate.metrics=[fid]")
    assert "could not be reached" not in run("data=folder:few")
    told = "expected as a PyTorch state dict in nowhere.pth"
    assert told in run("data=folder:some", "evaluate.inception_weights=nowhere.pth")
    assert "the distances are fid_digits" in run("evaluate.metrics=[fid]")
    assert "expected metrics among params, macs" in run("evaluate.metrics=[fidd]")
    with monkeypatch.context() as small:
        small.setattr("compress.common.memory.memory", lambda device: (2**28, 2**31))
        told = run("evaluate.samples=900000")
        assert "0.2 GiB of the 2.0 GiB of cpu are free; lower evaluate.samples" in told
        small.setattr("compress.common.memory.memory", lambda device: (2**22, 2**31))
        if not dry:  # which plans for other machines, too
            assert "0.0 GiB of the 2.0 GiB of cpu are free; choose another --device" in run()


def test_metrics_that_are_left_out_need_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "few").mkdir()
    for k in range(12):
        Image.new("L", (16, 16), 20 * k).save(tmp_path / "few" / f"{k}.png")
    metrics = "--set=evaluate.metrics=[macs, mse_to_dense]"
    arguments = ["run", "ddpm_gradflow", *SHORT, "--set=data=folder:few", metrics, "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert {*json.loads(result.stdout)["metrics"]} == {"macs", "mse_to_dense"}


def test_unsupported_unet_class(refused, tmp_path):
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DConditionModel

    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler()).save_pretrained(tmp_path / "conditional")
    message = refused("--set=model=./conditional")
    assert "needs encoder_hidden_states" in message and "plan with --dry-run" in message


def test_data_that_does_not_exist(refused):
    assert "nowhere" in refused("--set=data=folder:nowhere")
    assert "builtin:digits" in refused("--set=data=digits")


def test_data_that_does_not_fit_the_model(refused, tmp_path):
    (tmp_path / "images").mkdir()
    assert "images" in refused("--set=data=folder:images")


@pytest.fixture
def used(tmp_path):
    """A run that was just begun."""
    with claim(tmp_path / "used", "run", resume=False, overwrite=False):
        (tmp_path / "used" / "recipe.yaml").write_text("")
    return tmp_path / "used"


def test_output_with_a_finished_run(refused, used):
    (used / "report.html").write_text("")
    assert "--overwrite" in refused("--output=used")


def test_output_with_an_unfinished_run(refused, used):
    assert "--resume" in refused("--output=used")


def test_output_in_use_by_another_process(refused, used, tmp_path):
    with (tmp_path / "used" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "in use by another process" in refused("--output=used", "--resume")


def test_output_that_is_not_a_run_is_never_replaced(refused, tmp_path):
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "photo.jpg").write_bytes(b"precious")
    for options in ([], ["--overwrite"], ["--resume"]):
        said = refused("--output=holiday", *options)
        assert "photo.jpg; choose another --output\n" in said
    assert (tmp_path / "holiday" / "photo.jpg").read_bytes() == b"precious"


@pytest.mark.parametrize("output", ["--output=model/run", "--output=.", "--output=link/run"])
def test_output_and_input_in_one_another(refused, model, tmp_path, output):
    (tmp_path / "link").symlink_to(model)
    said = refused("--set=model=model", output, "--overwrite")
    assert "must not lie in one another; model is model" in said


def test_output_that_holds_the_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(
        "{model: builtin:ddpm-digits, data: builtin:digits, method: {name: oneshot}}"
    )
    for output in (".", tmp_path):
        result = CliRunner().invoke(app, ["run", "r.yaml", "--overwrite", f"--output={output}"])
        assert result.exit_code == 2 and "recipe is r.yaml, the output folder" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["r.yaml"]


def test_output_below_a_file(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "file" in refused("--output=file/run")


def test_device_that_does_not_exist(refused):
    assert "toaster" in refused("--device=toaster")


def hostile(place, folder, *arguments):
    """The exit code, the messages, and what is left in the folder."""
    cwd = folder.parent
    options = ["run", "ddpm_gradflow", *arguments, f"--output={folder / 'run'}"]
    done = programs.run("hostile", place, folder, *options, cwd=cwd, mounts=place != "closed")
    outcome = json.loads((cwd / "outcome.json").read_text())
    if outcome is None:
        pytest.skip("no private mounts, or root cannot give up its rights, on this machine")
    assert "Traceback" not in done.stderr and done.stdout == ""
    return outcome["code"], done.stderr, outcome["left"]


def test_no_write_permission(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    code, message, left = hostile("closed", closed)
    assert code == 1 and "Permission denied" in message and left == []


# the space is checked beforehand; without that check the disk fills while the run writes
@pytest.mark.parametrize("place", few(["small", "full"], "small"))
def test_full_disk(place, tmp_path):
    (tmp_path / "disk").mkdir()
    code, message, left = hostile(place, tmp_path / "disk", *SHORT)
    assert code == 1 and "space" in message.splitlines()[-1] and left == []


def test_a_disk_that_fills_up_during_a_run_can_be_resumed(tmp_path, monkeypatch):
    run, fsync = tmp_path / "run", os.fsync

    def full(handle):
        if (run / "state" / "state.safetensors").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    command = ["run", "ddpm_gradflow", *SHORT, f"--output={run}"]
    result = CliRunner().invoke(app, command)
    said = result.stderr.splitlines()[-1]
    assert result.exit_code == 1 and said.startswith(f"error: No space left on device: {run}/")
    assert said.endswith(f"continue with: compress {shlex.join([*command, '--resume'])}")
    assert "compress-tmp" not in said
