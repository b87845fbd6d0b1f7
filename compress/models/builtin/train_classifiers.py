"""Train the small classifiers: python compress/models/builtin/train_classifiers.py DIR.

`digits-features` (the extractor of `fid_digits`) learns half a of the digits, `digits-judge` half
b, `emoji-features` (of `fid_emoji`) the training part of the emoji, whose groups it tells apart;
each is tested on what it has not seen. Seeded; writes weights, config and `train.jsonl` below DIR.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from compress.common.output_folder import check_replaceable
from compress.data.batches import StepSampler
from compress.data.digits import digits
from compress.data.emoji import emoji
from compress.models.classifiers import SHAPE, ImageClassifier

Load = Callable[[str], tuple[torch.Tensor, torch.Tensor]]
DIGITS = {"channels": 1, "size": 16, "classes": 10}
EMOJI = {"channels": 3, "size": 32, "classes": 8}
# what each learns, what it is tested on, how
CLASSIFIERS: dict[str, tuple[Load, str, str, dict[str, Any]]] = {
    "digits-features": (digits, "a", "b", {"width": 32, **DIGITS, "seed": 0, "steps": 1500}),
    "digits-judge": (digits, "b", "a", {"width": 24, **DIGITS, "seed": 1, "steps": 1500}),
    "emoji-features": (
        *(emoji, "train", "held_out"),
        {"width": 32, **EMOJI, "seed": 0, "steps": 750, "shift": 2, "flip": True},
    ),
}


def train(folder: Path, name: str, batch: int = 64) -> None:
    """Train one classifier with random shifts, flips where it may, and pixel noise."""
    load, learnt, unseen, config = CLASSIFIERS[name]
    check_replaceable(folder, "classifier", overwrite=False)
    torch.manual_seed(config["seed"])
    model = ImageClassifier(**{key: config[key] for key in SHAPE})
    (images, labels), (test_images, test_labels) = load(learnt), load(unseen)
    steps, shift = config["steps"], config.get("shift", 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rows = []
    for step, indices in enumerate(StepSampler(len(images), batch, config["seed"], 0, steps)):
        shifts = torch.randint(-shift, shift + 1, (2,)).tolist()
        x = torch.roll(images[indices], shifts, dims=(2, 3))
        if config.get("flip") and torch.rand(()) < 0.5:
            x = x.flip(-1)
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
            print(name, rows[-1], flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    with torch.no_grad():
        lengths = model.features(images).square().sum(dim=1)
    facts = config | {"trained_on": learnt, "kid_gamma": 1 / float(lengths.mean())}
    (folder / "config.json").write_text(json.dumps(facts, indent=2) + "\n")
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", choices=CLASSIFIERS)
    given = parser.parse_args()
    for each in [given.only] if given.only else CLASSIFIERS:
        train(given.folder / each, each)
