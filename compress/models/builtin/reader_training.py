"""What the training scripts of the built-in readers share: curriculum, loop, state, evaluation."""

import argparse
import copy
import itertools
import json
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from rapidfuzz.distance import Levenshtein
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerFast

from compress.common.files import json_lines, write_text
from compress.common.journal import Journal
from compress.data.page_text import ALPHABET
from compress.data.pages import PAGE, Difficulty, Page, page
from compress.models.builtin.training import claimed, log_lines, run_arguments
from compress.models.vlm import load_vlm

TABLE_TAGS = ("<table>", "</table>", "<tr>", "</tr>", "<td>", "</td>")
RAISE_BELOW = 0.35  # running loss at which the next level begins: glyphs are learned faster where
# a page has more of them
EASIER = 0.2  # share of batches from levels below the current one
MOMENTS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
STACKS = 0.25  # learning rate of weights with more than two dimensions, over the others
MOST_PAGES = 1024  # page indices set aside for a step
SAVE_EVERY = 30.0  # seconds between states
Model = TypeVar("Model", bound=torch.nn.Module)


@dataclass(frozen=True)
class Level:
    """One step of the curriculum: what pages look like, and how many make a batch."""

    difficulty: Difficulty
    batch: int


# from one short line to full pages; with tokens of 16x16 pixels: 14, 28, 56, 80, 156, 312
LEVELS = (
    Level(Difficulty((112, 32), (1, 1), (4, 8), (14, 18), margin=(4, 6)), 64),
    Level(Difficulty((112, 64), (2, 2), (4, 8), (14, 18), margin=(4, 6)), 64),
    Level(Difficulty((112, 128), (3, 5), (4, 8), (14, 18)), 48),
    Level(Difficulty((160, 128), (3, 5), (6, 12), (14, 20), wear=0.25), 32),
    Level(Difficulty((208, 192), (5, 7), (10, 16), (14, 20), wear=0.25), 24),
    Level(PAGE, 16),
)


def character_tokenizer(
    specials: list[str], *, pad_token: str, eos_token: str, words: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character, and one per HTML tag of a table.

    Parameters
    ----------
    specials : special tokens, the first of which get the first ids.
    pad_token, eos_token : which of them pads, and which ends an answer.
    words : what else gets a token of its own, such as a prompt.
    """
    unknown = "<|unknown|>"
    pieces = [*specials, unknown, *TABLE_TAGS, "\n", " ", "#", *ALPHABET, *words]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    pattern = "|".join([r"</?t(?:able|r|d)>", *map(re.escape, words), r"[\s\S]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in [*specials, unknown]])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=unknown, pad_token=pad_token, eos_token=eos_token
    )


@dataclass
class Progress:
    """Where a training run is: all that a resumed one needs besides tensors."""

    step: int = 0
    level: int = 0
    level_steps: int = 0  # optimiser steps since the level began
    running: float | None = None  # mean loss of the current level's batches, recent ones first

    def seen(self, loss: float) -> None:
        """Take the loss of a batch of the current level into the running mean."""
        self.running = loss if self.running is None else 0.95 * self.running + 0.05 * loss

    def ready(self) -> bool:
        """Whether the level is learned."""
        return self.level_steps >= 50 and self.running is not None and self.running < RAISE_BELOW


@dataclass(frozen=True)
class Plan:
    """How a reader is trained.

    Parameters
    ----------
    seed : of pages and levels; together with the step it determines a batch.
    lr : learning rate after ``warmup`` steps, until the last level.
    final : steps on the last level, over which the learning rate falls linearly to zero.
    every : steps between evaluations.
    pages : validation pages of the current level in an evaluation.
    bf16 : whether products are in bfloat16: a quarter faster on CPUs with units for it, hundreds of
        times slower on others.
    first : level to begin with.
    workers : processes that render the pages of the next steps; 0 renders them in the step.
    """

    seed: int = 0
    lr: float = 1e-3
    warmup: int = 200
    final: int = 4000
    every: int = 500
    pages: int = 32
    bf16: bool = False
    first: int = 0
    workers: int = 0
    levels: tuple[Level, ...] = LEVELS

    def learning_rate(self, progress: Progress) -> float:
        """The learning rate of the next step."""
        last = progress.level == len(self.levels) - 1
        left = 1 - progress.level_steps / self.final if last else 1.0
        return self.lr * min(1.0, (progress.step + 1) / self.warmup) * left

    def draw(self, progress: Progress) -> tuple[int, list[Page]]:
        """The level and the pages of the next step."""
        rng = random.Random(f"{self.seed}/{progress.step}")
        level = progress.level
        if level and rng.random() < EASIER:
            level = rng.randrange(level)
        first = progress.step * MOST_PAGES
        chosen = self.levels[level]
        numbers = range(first, first + chosen.batch)
        return level, [page(self.seed, i, chosen.difficulty, "train") for i in numbers]


class Draws(Dataset[tuple[int, list[Page]]]):
    """The level and the pages of a step, by the progress before it."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __getitem__(self, progress: Progress) -> tuple[int, list[Page]]:
        return self.plan.draw(progress)


def cross_entropy(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss that transformers' models compute themselves."""
    return model(**inputs).loss


@dataclass(frozen=True)
class Reader:
    """What is trained: a model, how it reads, and how it is stored.

    Parameters
    ----------
    model : takes what ``encode`` returns.
    encode : pages to the model's inputs, labels among them.
    read : model and pages to texts, greedily.
    save : model and folder, which gets the model as a checkpoint.
    loss : of the model and what ``encode`` returned.
    """

    model: torch.nn.Module
    encode: Callable[[list[Page]], dict[str, torch.Tensor]]
    read: Callable[[torch.nn.Module, list[Page]], list[str]]
    save: Callable[[torch.nn.Module, Path], object]
    loss: Callable[[torch.nn.Module, dict[str, torch.Tensor]], torch.Tensor] = cross_entropy


class Trainer:
    """A reader in training, whose log and state go to a journal."""

    def __init__(self, reader: Reader, plan: Plan, journal: Journal) -> None:
        self.reader, self.model, self.plan, self.journal = reader, reader.model, plan, journal
        self.progress = Progress(level=plan.first)
        self._ahead: tuple[int, Iterator[tuple[int, list[Page]]]] | None = None
        matrices, stacks, rest = [], [], []
        for name, parameter in self.model.named_parameters():
            if parameter.ndim > 2:
                stacks.append(parameter)
            elif parameter.ndim == 2 and "embed" not in name and "head" not in name:
                matrices.append(parameter)
            else:
                rest.append(parameter)
        lr = self.plan.lr
        # Muon's steps are a fifth of AdamW's an element; convolutions and stacked experts, which it
        # does not take, learn nothing at AdamW's full rate
        groups: list[dict[str, Any]] = [{"params": rest}, {"params": stacks, "share": STACKS}]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
            torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        ]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def step(self) -> float:
        """One optimiser step; returns the loss."""
        progress = self.progress
        level, pages = self._draw()
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.plan.learning_rate(progress) * group.get("share", 1.0)
        inputs = {name: t.to(self.device) for name, t in self.reader.encode(pages).items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.plan.bf16):
            loss = self.reader.loss(self.model, inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if level == progress.level:
            progress.seen(loss.item())
        progress.step += 1
        progress.level_steps += 1
        if progress.level < len(self.plan.levels) - 1 and progress.ready():
            self._log("level", level=progress.level + 1, after=progress.level_steps)
            progress.level += 1
            progress.level_steps, progress.running = 0, None
        return loss.item()

    def _draw(self) -> tuple[int, list[Page]]:
        """The level and the pages of this step; workers draw the next ones of the same level."""
        if not self.plan.workers:
            return self.plan.draw(self.progress)
        if self._ahead is None or self._ahead[0] != self.progress.level:
            now = replace(self.progress)
            coming = (replace(now, step=step) for step in itertools.count(now.step))
            draws: Any = DataLoader(
                Draws(self.plan), batch_size=None, sampler=coming, num_workers=self.plan.workers
            )
            self._ahead = now.level, iter(draws)
        level, pages = next(self._ahead[1])
        return level, pages

    @property
    def done(self) -> bool:
        """Whether the last level has had its steps."""
        last = self.progress.level == len(self.plan.levels) - 1
        return last and self.progress.level_steps >= self.plan.final

    def _log(self, event: str, **facts: Any) -> None:
        """Append a row to the training log."""
        self.journal.log(event=event, step=self.progress.step, **facts)

    def run(self, save_every: float, publish: Callable[[torch.nn.Module], object]) -> None:
        """Train to the end; ``publish`` gets what is stored when the last level reads better."""
        best, saved = 1.0, time.monotonic()
        for row in self.journal.rows:
            if row["event"] == "polish":  # a loss of its own: what was best before does not count
                best = 1.0
            if row["event"] == "evaluation" and row["level"] == len(self.plan.levels) - 1:
                best = min(best, row["cer"])
        while not self.done:
            started = time.process_time()
            self.step()
            progress = self.progress
            if progress.step % 25 == 0:
                self._log(
                    "train",
                    level=progress.level,
                    loss=progress.running and round(progress.running, 4),
                    lr=self.plan.learning_rate(progress),
                    cpu_seconds=round(time.process_time() - started, 2),
                )
            if progress.step % self.plan.every == 0 or self.done:
                stored = as_stored(self.model)
                cer = self.evaluate(stored)
                self._log("evaluation", level=progress.level, cer=round(cer, 5))
                if progress.level == len(self.plan.levels) - 1 and cer < best:
                    best = cer
                    publish(stored)
            if time.monotonic() - saved > save_every or self.done:
                self.save()
                saved = time.monotonic()

    def evaluate(self, model: torch.nn.Module) -> float:
        """Character error rate on validation pages of the current level."""
        level = self.plan.levels[self.progress.level]
        pages = [page(0, i, level.difficulty, "validation") for i in range(self.plan.pages)]
        texts: list[str] = []
        for first in range(0, len(pages), level.batch):
            texts += self.reader.read(model, pages[first : first + level.batch])
        edits = sum(
            Levenshtein.distance(text, p.text) for text, p in zip(texts, pages, strict=True)
        )
        return edits / sum(len(p.text) for p in pages)

    def save(self) -> None:
        """Store weights, the optimisers' moments and progress."""
        tensors = {f"model/{name}": t for name, t in self.model.state_dict().items()}
        for name, parameter in self.model.named_parameters():
            for optimizer in self.optimizers:
                for key, value in optimizer.state.get(parameter, {}).items():
                    tensors[f"optimizer/{key}/{name}"] = value
        self.journal.save(tensors, vars(self.progress))

    def resume(self) -> None:
        """Go back to the stored state, if there is one."""
        saved = self.journal.load()
        self.journal.begin()
        if saved is None:
            return
        self.model.load_state_dict(saved.part("model"))
        for optimizer in self.optimizers:
            mine = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for name, parameter in self.model.named_parameters():
                for key in MOMENTS if id(parameter) in mine else ():
                    value = saved.tensors.get(f"optimizer/{key}/{name}")
                    if value is not None:
                        optimizer.state[parameter][key] = value
        saved.facts.pop("log_rows")
        self.progress = Progress(**saved.facts)

    def polish(self, stored: Path) -> None:
        """Begin the last level anew, with the weights and the log of a stored reader.

        The optimisers begin without moments: a model folder has none.
        """
        model, _ = load_vlm(stored)
        self.model.load_state_dict(model.state_dict())
        lines = json_lines(stored / "train.jsonl")
        self.journal.rows = [json.loads(line) for _, line in lines]
        step = self.journal.rows[-1]["step"]
        self.progress = Progress(step=step, level=len(self.plan.levels) - 1)
        self.journal.begin()
        self._log("polish", level=self.progress.level, final=self.plan.final, lr=self.plan.lr)


@torch.no_grad()
def as_stored(model: Model) -> Model:
    """A copy whose weights went through float16, in float32: what a reader of the file gets."""
    stored = copy.deepcopy(model).eval()
    for parameter in stored.parameters():  # no buffers: they are computed, not stored
        parameter.copy_(parameter.half())
    return stored


@torch.no_grad()
def answers(model: Any, processor: Any, inputs: Any) -> list[str]:
    """What a model writes greedily behind prompts of one length."""
    inputs = inputs.to(model.device)
    new = model.generate(**inputs, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(new, skip_special_tokens=True)


def train(description: str, build: Callable[[], Reader], levels: tuple[Level, ...]) -> None:
    """The command line of a reader's training script.

    Parameters
    ----------
    description : of the script.
    build : the untrained reader, from torch's random state.
    levels : of its curriculum.
    """
    parser = arguments(description)
    run(parser, parser.parse_args(), build, Plan(levels=levels))


def arguments(description: str) -> argparse.ArgumentParser:
    """What all training scripts of readers take."""
    parser = run_arguments(description)
    parser.add_argument(
        "--polish", type=Path, help="model folder from whose weights the last level begins anew"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 products")
    parser.add_argument("--lr", type=float, default=Plan.lr)
    parser.add_argument("--final", type=int, default=Plan.final, help="steps on the last level")
    parser.add_argument(
        "--workers", type=int, default=0, help="processes that render pages ahead, for a GPU"
    )
    return parser


def run(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    build: Callable[[], Reader],
    plan: Plan,
) -> None:
    """Train by a command line.

    Parameters
    ----------
    parser, args : of :func:`arguments`, and what it read.
    build : the untrained reader, from torch's random state.
    plan : what the command line does not say.
    """
    with claimed(parser, args):
        _run(args, build, plan)


def _run(args: argparse.Namespace, build: Callable[[], Reader], plan: Plan) -> None:
    output = args.run / "model"
    torch.manual_seed(args.seed)
    reader = build()
    reader.model.to(args.device)
    given = {name: getattr(args, name) for name in ("seed", "lr", "final", "bf16", "workers")}
    plan = replace(plan, **given)
    trainer = Trainer(reader, plan, Journal(args.run))
    if args.resume:
        trainer.resume()
    elif args.polish:
        trainer.polish(args.polish)

    def publish(model: torch.nn.Module) -> None:
        reader.save(model, output)
        keep_log()

    def keep_log() -> None:
        write_text(output / "train.jsonl", log_lines(trainer.journal))

    trainer.run(SAVE_EVERY, publish)
    if output.is_dir():  # its last rows, where the last weights were not the best
        keep_log()
