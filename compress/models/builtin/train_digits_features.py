"""Train the two digit classifiers: python compress/models/builtin/train_digits_features.py DIR.

`digits-features` (the extractor of `fid_digits`) learns half a, `digits-judge` half b; each is
tested on the other half. Seeded; writes weights, config and `train.jsonl` below DIR.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from compress.common.output_folder import check_replaceable
from compress.data.batches import StepSampler
from compress.data.digits import digits
from compress.models.digits_features import DigitsFeatures


def train(
    folder: Path, half: str, width: int, seed: int, steps: int = 1500, batch: int = 64
) -> None:
    """Train one classifier with random shifts of at most one pixel and a little pixel noise."""
    check_replaceable(folder, "classifier", overwrite=False)
    torch.manual_seed(seed)
    model = DigitsFeatures(width)
    images, labels = digits(half)
    test_images, test_labels = digits("b" if half == "a" else "a")
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rows = []
    for step, indices in enumerate(StepSampler(len(images), batch, seed, 0, steps)):
        shift = torch.randint(-1, 2, (2,)).tolist()
        x = torch.roll(images[indices], shift, dims=(2, 3))
        x = x + 0.05 * torch.randn_like(x)
        loss = F.cross_entropy(model(x), labels[indices])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 250 == 0:
            with torch.no_grad():
                accuracy = (model(test_images).argmax(1) == test_labels).float().mean().item()
            rows.append(
                {"step": step + 1, "loss": round(loss.item(), 5), "accuracy": round(accuracy, 5)}
            )
            print(folder.name, rows[-1], flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {"width": width, "trained_on_half": half, "seed": seed, "steps": steps}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    parent = Path(sys.argv[1])
    train(parent / "digits-features", half="a", width=32, seed=0)
    train(parent / "digits-judge", half="b", width=24, seed=1)
