"""The UNet of Stable Diffusion 1.5 at full size, with random weights: planned, cut, loaded, run."""

import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from builders import programs
from compress.cli import app

pytestmark = pytest.mark.slow
MOST_GIB = 16


def test_stable_diffusion_1_5_is_planned_cut_and_run_by_plain_diffusers(tmp_path):
    programs.run("stable_diffusion", "write", tmp_path)
    recipe = tmp_path / "sd.yaml"
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    captions = []
    for name in ("black.png", "white.png"):
        Image.new("RGB", (512, 512), name.removesuffix(".png")).save(pictures / name)
        captions.append(json.dumps({"file_name": name, "text": "a"}))
    (pictures / "metadata.jsonl").write_text("\n".join(captions))
    recipe.write_text(
        json.dumps(
            {
                "model": str(tmp_path / "dense"),
                "data": f"folder:{pictures}",
                "method": {"name": "gradflow", "keep_macs": 0.5},
                "output": str(tmp_path / "run"),
            }
        )
    )
    printed = CliRunner().invoke(app, ["run", str(recipe), "--dry-run", "--json"])
    assert printed.exit_code == 0, printed.output
    predicted = json.loads(printed.stdout)
    assert predicted["problems"] == [] and 0.47 <= predicted["keep_macs"] <= 0.5
    dense, slim = (int(n.replace(",", "")) for n in predicted["params"][0].split(" -> "))
    assert dense == 859_520_964  # as published
    assert float(programs.run("stable_diffusion", "cut", tmp_path).stdout) <= MOST_GIB
    assert int(programs.run("stable_diffusion", "draw", tmp_path).stdout) == slim
    files = [p for p in (tmp_path / "slim").rglob("*") if p.is_file()]
    size = sum(p.stat().st_size for p in files if p.name not in ("README.md", "compress.json"))
    assert predicted["bytes"][0].endswith(f" -> {size:,}")
