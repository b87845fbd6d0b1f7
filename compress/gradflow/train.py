"""One pruning run: soft flow, binarisation, surgery, recovery; resumable at any step."""

import math
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import UNet2DModel
from torch.nn import functional as F
from torch.utils.data import DataLoader

from compress.data import Batch, ImageData, StepSampler, noise_and_timesteps
from compress.gradflow import criterion as scoring
from compress.gradflow import flow, surgery
from compress.gradflow.distill import Teacher
from compress.gradflow.groups import check_scheduler, find_groups
from compress.gradflow.layout import Layout, build_layout
from compress.gradflow.masks import SoftUNet
from compress.gradflow.method import GradFlow, OneShot, Training
from compress.gradflow.state import Journal, Saved, Tensors
from compress.gradflow.widths import choose_widths
from compress.method import Event

WARM_UP = 20
VALIDATION_DRAWS = 2
TRACED_UNITS = 400
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Pruned:
    """The slim UNet (averaged weights) and the facts of its making."""

    unet: UNet2DModel
    widths: tuple[int, ...]
    report: dict[str, Any]
    trace: Tensors


def validation_loss(
    predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    images: torch.Tensor,
    scheduler,
    draws: int = VALIDATION_DRAWS,
) -> float:
    """Mean squared error of predicted noise over all images, with fixed noise and timesteps.

    Parameters
    ----------
    predict : maps noisy images ``(batch, channels, height, width)`` and timesteps ``(batch,)``
        to predicted noise.
    images : ``(n, channels, height, width)`` in [-1, 1].
    scheduler : for ``add_noise``.
    draws : noise draws per image.
    """
    total, length = 0.0, scheduler.config.num_train_timesteps
    with torch.no_grad():
        for draw in range(draws):
            full = noise_and_timesteps(images, length, seed=99, step=draw)
            for part in zip(*(tensor.split(256) for tensor in full), strict=True):
                batch = Batch(*part)
                noisy = scheduler.add_noise(batch.images, batch.noise, batch.timesteps)
                error = (predict(noisy, batch.timesteps) - batch.noise).square()
                total += error.mean(dim=(1, 2, 3)).sum().item()
    return total / (draws * len(images))


def _sample(output: Any) -> torch.Tensor:
    """The predicted noise of a UNet's or a soft UNet's output."""
    return output if isinstance(output, torch.Tensor) else output.sample


@dataclass
class _Masks:
    """Everything about the mask that survives between steps."""

    scores: torch.Tensor
    last_raw: torch.Tensor
    low: torch.Tensor
    returned: int = 0
    binary: bool = False
    estimates: int = 0
    trace: list[torch.Tensor] = field(default_factory=list)
    trace_steps: list[int] = field(default_factory=list)


class PruningRun:
    """Prunes one UNet with :class:`GradFlow` or :class:`OneShot`.

    Parameters
    ----------
    unet : the dense model; never modified.
    scheduler : its noise scheduler.
    data : training images and held-out images.
    method, training : the knobs.
    journal : where log and state go.
    device : where to train; accelerate's choice when None.
    resume : go on from the journal's state if it has one.

    Raises
    ------
    ValueError : for an unsupported model, unreachable ``keep_macs`` or impossible schedule.
    """

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler,
        data: ImageData,
        method: GradFlow | OneShot,
        training: Training,
        journal: Journal,
        *,
        device: str | None = None,
        resume: bool = False,
    ) -> None:
        self.scheduler, self.data, self.method, self.training = scheduler, data, method, training
        self.journal = journal
        self.accelerator = Accelerator(
            mixed_precision=training.mixed_precision,
            gradient_accumulation_steps=training.gradient_accumulation,
            log_with=list(training.trackers) or None,
            project_dir=journal.folder,
            cpu=device == "cpu",
        )
        parts = self.accelerator.num_processes * training.gradient_accumulation
        if training.batch % parts:
            raise ValueError(
                f"batch must divide by processes x gradient_accumulation = {parts}; got "
                f"batch={training.batch}; change one of them"
            )
        self.device = self.accelerator.device
        self.dense = unet.to(self.device).eval()
        check_scheduler(scheduler)
        self.groups = find_groups(unet)
        self.widths = choose_widths(unet, self.groups, method.keep_macs)
        self.layout: Layout = build_layout(unet, self.groups, self.widths)
        self.block = self.layout.block.to(self.device)
        self.quota = self.layout.quota.to(self.device)
        self.flow_steps = method.steps if isinstance(method, GradFlow) else 0
        self.total_steps = method.steps + training.recover_steps
        self.active_steps = self._active_steps()
        self.teacher = Teacher(self.dense, training.distill, training.distill_features, self.layout)
        self.seconds = {"train": 0.0, "criterion": 0.0}
        self.surgery_facts: dict[str, Any] = {}
        self.step = 0
        self.ema: Tensors = {}
        zeros = torch.zeros(self.layout.units, device=self.device)
        self.masks = _Masks(zeros, zeros, zeros.bool())
        self._traced = self._traced_units()
        self._resume = resume

    # ---- what happens, in order -------------------------------------------------------------

    def events(self) -> Generator[Event, None, Pruned]:
        """Run to the end; yields an event per optimiser step and returns the pruned model.

        Nothing is read from or written to the journal's folder before this.
        """
        self._enter(self.journal.load() if self._resume else None)
        if self.training.trackers:
            self.accelerator.init_trackers("compress")
        if self.stage == "flow":
            if isinstance(self.method, GradFlow):
                yield from self._steps("flow", self.flow_steps)
            else:
                self._score_once()
            self._operate()
            self._save()
        yield from self._steps("recover", self.total_steps)
        if self.training.trackers:
            self.accelerator.end_training()
        return Pruned(self._averaged(), self.widths, self._report(), self._trace())

    def _steps(self, stage: str, stop: int) -> Iterator[Event]:
        batches = self._batches(self.step, stop)
        first = 0 if stage == "flow" else self.flow_steps
        while self.step < stop:
            started = time.perf_counter()
            if stage == "flow":
                self._move_mask()
            loss = self._optimise(next(batches))
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss should be finite; it became {loss} at optimiser step {self.step}: "
                    "training diverged; lower recover.lr"
                )
            self.step += 1
            if stage == "recover":
                self._average()
            self.seconds["train"] += time.perf_counter() - started
            values = {"loss": loss, "lr": self._rate(self.step - 1)}
            self.journal.log(
                stage=stage, step=self.step, **values, seconds=round(self.seconds["train"], 3)
            )
            self.accelerator.log(values, step=self.step)
            if self.step % self.training.save_every == 0 or self.step == self.total_steps:
                self._save()
            yield Event(stage, self.step - first, stop - first, values)

    def _optimise(self, images: torch.Tensor) -> float:
        """One optimiser step on this process's share of the global batch."""
        torch.manual_seed(self.training.seed * 1_000_003 + self.step)  # dropout, if there is any
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(self.step)
        chunks = images.to(self.device).chunk(self.training.gradient_accumulation)
        first = self.accelerator.process_index * len(images)
        total = 0.0
        for chunk in chunks:
            with self.accelerator.accumulate(self.model):
                batch = noise_and_timesteps(
                    chunk,
                    self.scheduler.config.num_train_timesteps,
                    self.training.seed,
                    self.step,
                    first,
                    self.training.batch,
                )
                first += len(chunk)
                noisy = self.scheduler.add_noise(batch.images, batch.noise, batch.timesteps)
                with self.teacher.watch(self._unet()) as features:
                    predicted = _sample(self.model(noisy, batch.timesteps))
                loss = F.mse_loss(predicted.float(), batch.noise)
                loss = loss + self.teacher.loss(
                    noisy, batch.timesteps, predicted, features, self._mask()
                )
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
                total += loss.item() / len(chunks)
        return total

    # ---- the mask ---------------------------------------------------------------------------

    def _move_mask(self) -> None:
        """Before an optimiser step: move the mask when it is due, binarise at the end."""
        method = self.method
        soft = self._plain()
        if self.step == self.active_steps:
            self._binarise(soft)
        if self.step >= self.active_steps or self.step % method.update_every:
            return
        update = self.step // method.update_every
        updates = math.ceil(self.active_steps / method.update_every)
        rank = None
        if update % method.criterion_every == 0:
            rank = self._estimate(soft)
        progress = (update + 1) / updates
        sizes = self.layout.sizes().to(self.device).float()
        removed = flow.removed_share(progress, method.budget)
        budget = sizes - removed * (sizes - self.quota)
        before = soft.mask.clone()
        gamma = method.gamma * progress
        if method.process == "hard":
            kept = budget.ceil().long()
            soft.mask.copy_(flow.binarise(before, self.masks.scores, self.block, kept))
        else:
            soft.mask.copy_(
                flow.flow_step(
                    before,
                    self.masks.scores,
                    gamma=gamma,
                    rate=method.flow_rate,
                    max_move=method.max_move,
                    budget=budget,
                    block=self.block,
                )
            )
        self._follow(soft.mask)
        self.journal.log(
            stage="mask",
            step=self.step,
            budget=(budget.sum() / sizes.sum()).item(),
            gamma=gamma,
            max_move=(soft.mask - before).abs().max().item(),
            undecided=((soft.mask > 0.05) & (soft.mask < 0.95)).float().mean().item(),
            returned=self.masks.returned,
            spearman=rank,
        )

    def _follow(self, mask: torch.Tensor) -> None:
        """Count units that came back from under one half, and keep the trace for the report."""
        now_low = mask < 0.5
        self.masks.returned += int((self.masks.low & ~now_low).sum())
        self.masks.low = now_low
        self.masks.trace.append(mask[self._traced].cpu().clone())
        self.masks.trace_steps.append(self.step)

    def _estimate(self, soft: SoftUNet) -> float | None:
        """Refresh the scores; returns the rank correlation with the estimate before."""
        started = time.perf_counter()
        raw = scoring.raw_scores(
            soft,
            self.scheduler,
            self._criterion_batches(),
            criterion=self.method.criterion,
            reduction=self.method.reduction,
            hvp=self.method.hvp,
            horizon=self._horizon(),
            seed=self.training.seed,
        )
        fresh = scoring.normalise(raw, self.layout, self.method.criterion)
        masks = self.masks
        rank = None
        if masks.estimates:
            alive = soft.mask > 0.05
            rank = flow.spearman(masks.last_raw[alive], fresh[alive])
            decay = self.method.score_ema
            masks.scores = decay * masks.scores + (1 - decay) * fresh
        else:
            masks.scores = fresh
        masks.last_raw = fresh
        masks.estimates += 1
        self.seconds["criterion"] += time.perf_counter() - started
        return None if rank is None or math.isnan(rank) else rank

    def _score_once(self) -> None:
        """Score the dense model and choose the kept units at once."""
        started = time.perf_counter()
        soft, method = self._plain(), self.method
        batches = self._criterion_batches()
        if method.criterion == "diff_pruning":
            raw = scoring.diff_pruning_scores(
                soft, self.scheduler, batches, threshold=method.threshold
            )
        else:
            raw = scoring.raw_scores(
                soft,
                self.scheduler,
                batches,
                criterion=method.criterion,
                reduction=method.reduction,
                hvp=method.hvp,
                horizon=self._horizon(),
                seed=self.training.seed,
            )
        self.masks.scores = scoring.normalise(raw, self.layout, method.criterion)
        elapsed = time.perf_counter() - started
        self.seconds["criterion"] += elapsed
        self.seconds["train"] += elapsed
        self._binarise(soft)

    def _binarise(self, soft: SoftUNet) -> None:
        """Set every mask to 0 or 1 and let unaligned norms take the slim net's membership."""
        before = self._held_out_loss(soft)
        soft.mask.copy_(flow.binarise(soft.mask, self.masks.scores, self.block, self.quota))
        switched = soft.adopt_slim_membership()
        self.masks.binary = True
        self._follow(soft.mask)
        self.surgery_facts = {
            "loss_before_binarise": before,
            "loss_after_binarise": self._held_out_loss(soft),
            "switched_norms": switched,
        }

    def _operate(self) -> None:
        """Surgery: the masked network becomes a plain slim one; Adam's moments are cut alike."""
        soft: SoftUNet = self._plain()
        if not self.masks.binary:
            self._binarise(soft)
        slim = surgery.perform(soft.unet, self.layout, soft.mask)
        images = self._held_out()[:64]
        times = torch.linspace(
            0, self.scheduler.config.num_train_timesteps - 1, len(images), device=self.device
        ).long()
        soft.eval()
        slim.eval()
        with torch.no_grad(), scoring.full_precision():
            masked_output = SoftUNet.forward(soft, images, times)
            difference = (masked_output - slim(images, times).sample).abs().max().item()
        self.surgery_facts |= {
            "loss_masked": self._held_out_loss(soft),
            "loss_slim": self._held_out_loss(slim),
            "max_difference": difference,
            "groups": len(self.groups),
            "unaligned_norms": len(self.layout.unaligned),
        }
        self.journal.log(stage="surgery", step=self.step, **self.surgery_facts)
        moments = {
            key: surgery.cut(tensors, self.layout, soft.mask)
            for key, tensors in self._moments().items()
        }
        self.kept = soft.mask.detach().clone()
        self.accelerator.free_memory()
        self.stage = "recover"
        self._prepare(slim)
        self._load_moments(moments)
        self.ema = {name: p.detach().clone() for name, p in slim.named_parameters()}

    # ---- small pieces -----------------------------------------------------------------------

    def _active_steps(self) -> int:
        """Optimiser steps before binarisation; checks that the schedule fits the bound."""
        if not isinstance(self.method, GradFlow):
            return 0
        active = self.method.steps - int(self.method.settle * self.method.steps)
        if self.method.process == "soft":
            flow.updates_fit(
                math.ceil(active / self.method.update_every),
                self.layout.sizes().float(),
                self.layout.quota.float(),
                self.method.max_move,
                self.method.budget,
            )
        return active

    def _rate(self, step: int) -> float:
        """Warm-up, constant until surgery, then a cosine to 0: one rule for every method."""
        after = max(0, step - self.flow_steps) / max(1, self.total_steps - self.flow_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * after))
        return self.training.lr * min(1.0, (step + 1) / WARM_UP) * cosine

    def _horizon(self) -> float:
        every = self.method.update_every if isinstance(self.method, GradFlow) else 1
        return self.method.horizon or self.training.lr * every

    def _batches(self, start: int, stop: int) -> Iterator[torch.Tensor]:
        sampler = StepSampler(
            len(self.data.train),
            self.training.batch,
            self.training.seed,
            start,
            stop,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        return iter(DataLoader(self.data.train, batch_sampler=sampler))

    def _criterion_batches(self) -> list[Batch]:
        """Fresh minibatches for the next estimate, a function of (seed, estimate)."""
        seed, number = self.training.seed + 7919, self.masks.estimates
        count = self.method.criterion_batches
        sampler = StepSampler(
            len(self.data.train), self.training.batch, seed, number * count, (number + 1) * count
        )
        length = self.scheduler.config.num_train_timesteps
        return [
            noise_and_timesteps(images.to(self.device), length, seed, number * count + k)
            for k, images in enumerate(DataLoader(self.data.train, batch_sampler=sampler))
        ]

    def _held_out(self) -> torch.Tensor:
        count = min(256, len(self.data.held_out))
        return torch.stack([self.data.held_out[i] for i in range(count)]).to(self.device)

    def _held_out_loss(self, model) -> float:
        """Validation loss on at most 256 held-out images with one noise draw: cheap."""
        training = model.training
        model.eval()

        def predict(sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return _sample(type(model).forward(model, sample, timestep))

        loss = validation_loss(predict, self._held_out(), self.scheduler, draws=1)
        model.train(training)
        return loss

    def _average(self) -> None:
        since = self.step - self.flow_steps
        decay = min(self.training.ema, (1 + since) / (10 + since))
        with torch.no_grad():
            for name, p in self._plain().named_parameters():
                self.ema[name].lerp_(p, 1 - decay)

    def _averaged(self) -> UNet2DModel:
        slim = UNet2DModel.from_config(surgery.slim_config(self.dense, self.layout))
        slim.load_state_dict({name: t.cpu() for name, t in self.ema.items()})
        return slim.eval()

    def _plain(self):
        return self.accelerator.unwrap_model(self.model)

    def _unet(self) -> UNet2DModel:
        """The UNet that holds the trained parameters."""
        plain = self._plain()
        return plain.unet if isinstance(plain, SoftUNet) else plain

    def _mask(self) -> torch.Tensor:
        """The mask while it moves, the kept units after surgery."""
        plain = self._plain()
        return plain.mask if isinstance(plain, SoftUNet) else self.kept

    def _traced_units(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(self.layout.units, generator=generator)[:TRACED_UNITS]
        return order.sort().values.to(self.device)

    def _trace(self) -> Tensors:
        if not self.masks.trace:
            return {}
        return {
            "masks": torch.stack(self.masks.trace),
            "steps": torch.tensor(self.masks.trace_steps),
        }

    def _report(self) -> dict[str, Any]:
        return {
            "train_seconds": self.seconds["train"],
            "criterion_seconds": self.seconds["criterion"],
            "criterion_share": self.seconds["criterion"] / max(self.seconds["train"], 1e-9),
            "optimiser_steps": self.step,
            "returned_channels": self.masks.returned,
            "surgery": self.surgery_facts,
        }

    # ---- state ------------------------------------------------------------------------------

    def _prepare(self, model) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.training.lr, weight_decay=0.0)
        model.train()
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    def _enter(self, saved: Saved | None) -> None:
        """Start at the beginning, or at a saved state."""
        self.kept = torch.zeros(0, device=self.device)
        self.stage = "flow" if saved is None else saved.facts["stage"]
        if self.stage == "flow":
            model: Any = SoftUNet(self.dense, self.layout)
        else:
            model = UNet2DModel.from_config(surgery.slim_config(self.dense, self.layout))
        self._prepare(model.to(self.device))
        if saved is None:
            return
        self._check_same_machine(saved.facts)
        weights = saved.part("model")
        with torch.no_grad():
            for name, p in self._unet().named_parameters():
                p.copy_(weights[name])
        self.step, self.seconds = saved.facts["step"], saved.facts["seconds"]
        self._load_moments({key: saved.part(key) for key in MOMENTS})
        self.ema = {name: t.to(self.device) for name, t in saved.part("ema").items()}
        parts = {name: t.to(self.device) for name, t in saved.part("masks").items()}
        facts = saved.facts
        self.masks = _Masks(
            parts["scores"],
            parts["last_raw"],
            parts["low"],
            facts["returned"],
            facts["binary"],
            facts["estimates"],
            list(saved.part("masks")["trace"].unbind()) if facts["trace_steps"] else [],
            facts["trace_steps"],
        )
        self.surgery_facts = facts["surgery"]
        self.kept = parts["kept"]
        if self.stage == "flow":
            soft = self._plain()
            soft.mask.copy_(parts["mask"])
            if self.masks.binary:
                soft.adopt_slim_membership()

    def _moments(self) -> dict[str, Tensors]:
        """Adam's running moments by parameter name; empty before the first step."""
        state = self.optimizer.state
        named = [(n, p) for n, p in self._unet().named_parameters() if p in state]
        return {key: {n: state[p][key] for n, p in named} for key in MOMENTS}

    def _load_moments(self, moments: dict[str, Tensors]) -> None:
        for name, p in self._unet().named_parameters():
            if name in moments["exp_avg"]:
                self.optimizer.state[p] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": moments["exp_avg"][name].to(p.device).clone(),
                    "exp_avg_sq": moments["exp_avg_sq"][name].to(p.device).clone(),
                }

    def _save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        plain, masks = self._plain(), self.masks
        tensors = {f"model/{n}": t for n, t in self._unet().named_parameters()}
        for key, moments in self._moments().items():
            tensors |= {f"{key}/{n}": t for n, t in moments.items()}
        tensors |= {f"ema/{n}": t for n, t in self.ema.items()}
        tensors |= {
            "masks/scores": masks.scores,
            "masks/last_raw": masks.last_raw,
            "masks/low": masks.low,
            "masks/kept": self.kept,
        }
        if masks.trace:
            tensors["masks/trace"] = torch.stack(masks.trace)
        if isinstance(plain, SoftUNet):
            tensors["masks/mask"] = plain.mask
        self.journal.save(
            tensors,
            {
                "stage": self.stage,
                "step": self.step,
                "returned": masks.returned,
                "binary": masks.binary,
                "estimates": masks.estimates,
                "trace_steps": masks.trace_steps,
                "seconds": self.seconds,
                "surgery": self.surgery_facts,
                "widths": list(self.widths),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
            },
        )

    def _check_same_machine(self, facts: dict[str, Any]) -> None:
        here = {"threads": torch.get_num_threads(), "torch": torch.__version__}
        for key, value in here.items():
            if facts[key] != value:
                warnings.warn(
                    f"the saved state was made with {key}={facts[key]}, here it is {value}: the "
                    "resumed run may differ from an uninterrupted one in the last bits",
                    stacklevel=2,
                )
