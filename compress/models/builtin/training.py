"""What training scripts share: runs that go on after a kill, and the trainer of denoisers."""

import argparse
import copy
import json
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from torch.optim.swa_utils import get_ema_multi_avg_fn

from compress.common.files import atomic_folder, write_text
from compress.common.journal import Journal
from compress.common.output_folder import claim
from compress.parallel import sharding

MOMENTS = ("exp_avg", "exp_avg_sq")


def run_arguments(description: str | None) -> argparse.ArgumentParser:
    """What all scripts take that go on with ``--resume``."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--run", type=Path, required=True, help="new folder of log, state and model"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the state in --run")
    parser.add_argument("--seed", type=int, default=0)
    return parser


@contextmanager
def claimed(parser: argparse.ArgumentParser, args: argparse.Namespace) -> Iterator[None]:
    """The folder of a run, which is new unless the run is resumed."""
    if not args.resume and os.path.lexists(args.run):
        parser.error(f"{args.run} exists; give --resume to go on, or another folder")
    with claim(args.run, "training", resume=args.resume, overwrite=False):
        yield


def log_lines(journal: Journal) -> str:
    """The log, as it lies beside the weights."""
    return "".join(json.dumps(row) + "\n" for row in journal.rows)


class DenoiserTrainer:
    """Trains a denoiser with AdamW, and averages its weights; its state lies in the journal.

    Parameters
    ----------
    args : of :func:`run_arguments`, and ``lr``.
    model : on its device.
    """

    FACTS: ClassVar[tuple[str, ...]] = ("step", "best")  # of the state, beside tensors

    def __init__(self, args: argparse.Namespace, model: torch.nn.Module) -> None:
        self.args, self.journal, self.step, self.best = args, Journal(args.run), 0, math.inf
        self.model = model
        self.averaged = copy.deepcopy(model).eval()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, fused=True)

    def resume(self) -> None:
        """Go back to the stored state, if there is one."""
        saved = self.journal.load()
        if saved is None:
            return
        self.model.load_state_dict(saved.part("model"))
        self.averaged.load_state_dict(saved.part("averaged"))
        for name in self.FACTS:
            setattr(self, name, saved.facts[name])
        moments = {key: saved.part(key) for key in MOMENTS}
        state = {
            number: {"step": torch.tensor(float(self.step))}
            | {key: sharding.cut_like(moments[key][name], p) for key in MOMENTS}
            for number, (name, p) in enumerate(self.model.named_parameters())
        }
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def save(self) -> None:
        """Store weights, averages, moments and where the run is."""
        tensors = {f"model/{name}": t for name, t in self.model.state_dict().items()}
        tensors |= {f"averaged/{name}": t for name, t in self.averaged.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for key in MOMENTS:
                tensors[f"{key}/{name}"] = self.optimizer.state[parameter][key]
        self.journal.save(tensors, {name: getattr(self, name) for name in self.FACTS})

    def run(self) -> None:
        """Train to the end."""
        raise NotImplementedError

    def learn(self, loss: torch.Tensor, lr: float, longest: float) -> None:
        """One step down a loss, and one of the average.

        Parameters
        ----------
        loss : of this step.
        lr : its learning rate.
        longest : weight of the past in the average, at most; it begins at a tenth.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        average = get_ema_multi_avg_fn(min(longest, (1 + self.step) / (10 + self.step)))
        average(list(self.averaged.parameters()), list(self.model.parameters()), self.step)

    def as_stored(self, model: torch.nn.Module) -> Any:
        """A model of this kind with the average, rounded as it is stored."""
        half = {name: t.half().float() for name, t in self.averaged.state_dict().items()}
        model.load_state_dict(half)
        return model.eval()

    def log(self, facts: dict[str, Any]) -> None:
        """Log a row of this step, and print it."""
        self.journal.log(step=self.step, **facts)
        print(self.journal.rows[-1], flush=True)

    def publish(self, pipeline: DiffusionPipeline) -> None:
        """Write the model, and the log beside it."""
        with atomic_folder(self.args.run / "model") as folder:
            pipeline.to(torch.float16).save_pretrained(folder)
            write_text(folder / "train.jsonl", log_lines(self.journal))


def train(
    parser: argparse.ArgumentParser, trainer: Callable[[argparse.Namespace], DenoiserTrainer]
) -> None:
    """Train a denoiser by the command line."""
    args = parser.parse_args()
    with claimed(parser, args):
        training = trainer(args)
        if args.resume:
            training.resume()
        training.run()
