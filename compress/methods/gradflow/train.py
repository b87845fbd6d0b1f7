"""One pruning run: soft flow, binarisation, surgery, recovery; resumable at any step."""

import contextlib
import math
import time
import warnings
from collections.abc import Generator, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch.nn import functional as F

from compress.common.journal import Saved, Tensors
from compress.data.batches import Examples
from compress.methods.base import Event, Pruned, PruneJob
from compress.methods.gradflow import surgery
from compress.methods.gradflow.allocation import plan
from compress.methods.gradflow.batches import Batches
from compress.methods.gradflow.criterion import full_precision
from compress.methods.gradflow.distill import Teacher
from compress.methods.gradflow.groups import UNet, dense_widths
from compress.methods.gradflow.layout import Layout
from compress.methods.gradflow.mask_scheduler import MaskScheduler, MaskState
from compress.methods.gradflow.masks import SoftUNet, predict
from compress.methods.gradflow.unets import find_groups
from compress.models.objective import (
    VALIDATED_AT_ONCE,
    check_trainable,
    inputs_of,
    noise_schedule,
    prediction_target,
    validation_loss,
)
from compress.models.pipelines import denoiser, placed
from compress.parallel import distributed, sharding

if TYPE_CHECKING:
    from compress.methods.gradflow.method import ChannelPruning

WARM_UP = 20
COMPARED = 64
MOMENTS = ("exp_avg", "exp_avg_sq")


def prune(method: "ChannelPruning", job: PruneJob) -> Generator[Event, None, Pruned]:
    """Prune the denoiser of a pipeline, which is where and as it was at the end.

    Yields
    ------
    Event : "prepare" with the widths, when everything is checked and nothing is written; then one
        for each optimiser step.

    Raises
    ------
    ValueError : for an unsupported model, unreachable ``keep_macs`` or impossible schedule.
    """
    check_trainable(job.pipeline)
    _, unet = denoiser(job.pipeline)
    with placed([unet, *inputs_of(job.pipeline).modules], job.device):
        run = PruningRun(method, job)
        message = (
            f"widths {dense_widths(unet)} -> {run.layout.widths}, {run.total_steps} optimiser steps"
        )
        yield Event("prepare", 1, 1, message=message)
        return (yield from run.events())


class PruningRun:
    """Prunes one UNet, on one process or several.

    All processes hold the same masks and scores, and the same weights or, with FSDP, a part of
    each. Every one has its share of every batch; gradients, those of the criterion too, are
    averaged. Batches, noise, timesteps and flips are functions of (seed, step, sample), so the
    number of processes changes rounding only; dropout draws by (seed, step, process). Checksums are
    compared whenever the mask moves, after surgery and before each state.

    Parameters
    ----------
    method : the knobs.
    job : what to prune, on which data; its ``device`` is a process's own where there are several.

    Raises
    ------
    ValueError : for an unsupported model, unreachable ``keep_macs`` or impossible schedule.
    """

    def __init__(self, method: "ChannelPruning", job: PruneJob) -> None:
        self.method, self.training, self.journal = method, job.training, job.journal
        training, journal, (_, unet) = job.training, job.journal, denoiser(job.pipeline)
        self.noise_scheduler = noise_schedule(job.pipeline.scheduler)
        self.inputs = inputs_of(job.pipeline)
        self.inputs.check(job.data)
        self.accelerator = Accelerator(
            mixed_precision=training.mixed_precision,
            gradient_accumulation_steps=training.gradient_accumulation,
            log_with=list(training.trackers) or None,
            project_dir=journal.folder,
            cpu=job.device == "cpu",
        )
        training.check_batch(self.accelerator.num_processes)
        sharding.gather_in_float32(self.accelerator)
        sharding.check_blocks(self.accelerator, unet)
        self.device = self.accelerator.device
        self.dense = unet.to(self.device).eval()
        self.inputs.to(self.device)
        timesteps = self.noise_scheduler.config.num_train_timesteps
        self.batches = Batches(job.data, self.inputs, training, timesteps, self.accelerator)
        self.groups = find_groups(unet)
        layout, allocator = plan(unet, self.groups, method)
        self.masks = MaskScheduler(
            method,
            layout,
            allocator,
            self.noise_scheduler,
            partial(self.batches.criterion_parts, count=method.criterion_batches),
            training,
            self.device,
        )
        self.flow_steps = method.flow.steps if method.flow else 0
        self.total_steps = method.steps + training.steps
        self.teacher = Teacher(self.dense, training.distill, training.distill_features, layout)
        self.train_seconds = 0.0
        self.surgery_facts: dict[str, Any] = {}
        self.step = 0
        self.ema: Tensors = {}
        journal.keep = training.keep_states
        journal.writes &= self.accelerator.is_main_process
        saved = journal.load() if job.resume else None
        distributed.check_same(
            "recipe, model and saved state (the run's folder must be one that every process sees)",
            dict(unet.named_parameters()) | (saved.tensors if saved else {}),
            (method, training, layout.widths, len(job.data.train), saved and saved.facts),
        )
        self._enter(saved)

    @property
    def layout(self) -> Layout:
        """Which unit masks what, and how many units stay; counts move where widths are free."""
        return self.masks.layout

    # ---- what happens, in order -------------------------------------------------------------

    def events(self) -> Generator[Event, None, Pruned]:
        """Run to the end; yields an event per optimiser step and returns the pruned model.

        Nothing is written to the journal's folder before this.
        """
        self.journal.begin()
        if self.training.trackers:
            self.accelerator.init_trackers("compress")
        if self.stage == "flow":
            yield from self._steps("flow", self.flow_steps)
            self._operate()
            self._save()
        yield from self._steps("recover", self.total_steps)
        if self.training.trackers:
            self.accelerator.end_training()
        slim = surgery.slim_unet(self.dense, self.layout)
        slim.load_state_dict({n: t.cpu() for n, t in sharding.gathered(self.ema).items()})
        state, facts = self.masks.state, self.surgery_facts
        report = {
            "train_seconds": self.train_seconds,
            "criterion_seconds": state.seconds,
            "criterion_share": state.seconds / max(self.train_seconds, 1e-9),
            "optimiser_steps": self.step,
            "returned_channels": state.returned,
            "surgery": {k: v if math.isfinite(v) else None for k, v in facts.items()},
        }
        widths = surgery.width_rows(self.dense, self.layout)
        return Pruned(slim.eval(), widths, report, self.masks.trace())

    def _steps(self, stage: str, stop: int) -> Iterator[Event]:
        examples = self.batches.examples(self.step, stop, self.training.seed)
        first = 0 if stage == "flow" else self.flow_steps
        while self.step < stop:
            started = time.perf_counter()
            if stage == "flow":
                self._move_mask()
            loss = self._optimise(next(examples))
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss should be finite; it became {loss} at optimiser step {self.step}: "
                    "training diverged; lower recover.lr"
                )
            self.step += 1
            if stage == "recover":
                self._average()
            self.train_seconds += time.perf_counter() - started
            values = {"loss": loss, "lr": self._rate(self.step - 1)}
            self.journal.log(
                stage=stage, step=self.step, **values, seconds=round(self.train_seconds, 3)
            )
            self.accelerator.log(values, step=self.step)
            if self.step % self.training.save_every == 0 or self.step == self.total_steps:
                self._save()
            yield Event(stage, self.step - first, stop - first, values)

    def _move_mask(self) -> None:
        """Before an optimiser step: move the mask when it is due, binarise at the end."""
        soft = self._plain()
        row = self.masks.move(soft, self.step)
        if row is not None:
            self.journal.log(stage="mask", step=self.step, **row)
            self._check_same("the mask moved", {"mask": soft.mask})
        if self.method.flow and self.step == self.method.flow.binarised_at:
            self._binarise(soft)

    def _optimise(self, examples: Examples) -> float:
        """One optimiser step on this process's share of the global batch."""
        # dropout, if there is any
        process = self.accelerator.process_index
        torch.manual_seed((self.training.seed * 1_000_003 + self.step + process * 2**40) % 2**63)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(self.step)
        plain, total = self._plain(), 0.0
        mask = plain.mask if isinstance(plain, SoftUNet) else self.kept
        for batch in self.batches.training_parts(examples, self.step):
            with self.accelerator.accumulate(self.model):
                noisy = self.noise_scheduler.add_noise(batch.images, batch.noise, batch.timesteps)
                with self.teacher.record(self._unet()) as features:
                    predicted = self.model(noisy, batch.timesteps, **batch.condition).sample
                target = prediction_target(self.noise_scheduler, batch)
                loss = F.mse_loss(predicted.float(), target) + self.teacher.loss(
                    noisy, batch.timesteps, predicted, features, mask, batch.condition
                )
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
                total += loss.item() / self.training.gradient_accumulation
        return distributed.mean_value(total, self.device)

    def _rate(self, step: int) -> float:
        """Warm-up, constant until surgery, then a cosine to 0: one rule for every method."""
        after = max(0, step - self.flow_steps) / max(1, self.total_steps - self.flow_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * after))
        return self.training.lr * min(1.0, (step + 1) / WARM_UP) * cosine

    def _average(self) -> None:
        since = self.step - self.flow_steps
        decay = min(self.training.ema, (1 + since) / (10 + since))
        with torch.no_grad():
            for name, p in self._plain().named_parameters():
                self.ema[name].lerp_(p, 1 - decay)

    # ---- binarisation and surgery -----------------------------------------------------------

    def _binarise(self, soft: SoftUNet) -> None:
        if not self.masks.state.estimates:  # one-shot: the dense model is scored, once
            self.masks.estimate(soft)
            self.train_seconds += self.masks.state.seconds
        with sharding.whole(soft):
            before = self._held_out_loss(soft)
            switched = self.masks.binarise(soft, self.step)
            self.surgery_facts = {
                "loss_before_binarise": before,
                "loss_after_binarise": self._held_out_loss(soft),
                "switched_norms": switched,
            }

    def _operate(self) -> None:
        """Surgery: the masked network becomes a plain slim one; Adam's moments are cut alike."""
        soft: SoftUNet = self._plain()
        if not self.masks.state.binary:
            self._binarise(soft)
        with sharding.whole(soft):
            slim = surgery.perform(soft.unet, self.layout, soft.mask)
            self.surgery_facts |= {
                "max_difference": self._max_difference(soft, slim),
                "loss_masked": self._held_out_loss(soft),
                "loss_slim": self._held_out_loss(slim),
                "groups": len(self.groups),
                "unaligned_norms": len(self.layout.unaligned),
            }
        self.journal.log(stage="surgery", step=self.step, **self.surgery_facts)
        moments = {
            key: surgery.cut(sharding.gathered(tensors), self.layout, soft.mask)
            for key, tensors in self._moments().items()
        }
        self.kept = soft.mask.detach().clone()
        self._check_same("surgery", {"kept": self.kept, **dict(slim.named_parameters())})
        self.accelerator.free_memory()
        self.stage = "recover"
        self._prepare(slim)
        self._load_moments(moments)
        self.ema = {name: p.detach().clone() for name, p in self._unet().named_parameters()}

    def _max_difference(self, soft: SoftUNet, slim: UNet) -> float:
        """How far the masked and the slim network are apart on held-out samples."""
        batch = self.batches.held_out_batch(COMPARED)
        last = self.noise_scheduler.config.num_train_timesteps - 1
        times = torch.linspace(0, last, len(batch.images), device=self.device).long()
        with torch.no_grad(), full_precision():
            masked, cut = (
                predict(model.eval(), batch.images, times, **batch.condition)
                for model in (soft, slim)
            )
        return (masked - cut).abs().max().item()

    def _held_out_loss(self, model: torch.nn.Module) -> float:
        """Validation loss on at most 256 held-out images with one noise draw: cheap."""
        training = model.training
        model.eval()
        held_out = self.batches.held_out(VALIDATED_AT_ONCE)
        loss = validation_loss(
            partial(predict, model),
            held_out.images,
            self.noise_scheduler,
            draws=1,
            inputs=self.inputs,
            conditions=held_out.conditions,
        )
        model.train(training)
        return loss

    # ---- the model in training --------------------------------------------------------------

    def _prepare(self, model: Any) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.training.lr, weight_decay=0.0)
        model.train()
        if self.training.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        masked = isinstance(model, SoftUNet)
        with sharding.one_unit(self.accelerator) if masked else contextlib.nullcontext():
            self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    def _plain(self) -> Any:
        """The soft UNet until surgery, then the slim one, without accelerate's wrapper."""
        return self.accelerator.unwrap_model(self.model)

    def _unet(self) -> UNet:
        """The UNet that holds the trained parameters."""
        plain = self._plain()
        return plain.unet if isinstance(plain, SoftUNet) else plain

    def _check_same(self, when: str, tensors: Tensors) -> None:
        tensors = tensors | {"scores": self.masks.state.scores}
        distributed.check_same(f"masks, scores and weights after {when}", tensors, self.step)

    # ---- state ------------------------------------------------------------------------------

    def _enter(self, saved: Saved | None) -> None:
        """Start at the beginning, or at a saved state."""
        self.kept = torch.zeros(0, device=self.device)
        self.stage = "flow" if saved is None else saved.facts["stage"]
        if saved is not None:
            masks = {name: t.to(self.device) for name, t in saved.part("masks").items()}
            self.masks.state = MaskState.restored(masks, saved.facts["masks"])
        soft = SoftUNet(self.dense, self.layout) if self.stage == "flow" else None
        unet = surgery.slim_unet(self.dense, self.layout) if soft is None else soft.unet
        if saved is not None:
            weights = saved.part("model")
            with torch.no_grad():
                for name, p in unet.named_parameters():
                    p.copy_(weights[name])
        self._prepare((soft or unet).to(self.device))
        if saved is None:
            return
        facts = saved.facts
        for key, here in _machine().items():
            if facts[key] != here:
                warnings.warn(
                    f"the saved state was made with {key}={facts[key]}, here it is {here}: the "
                    "resumed run may differ from an uninterrupted one in the last bits",
                    stacklevel=2,
                )
        self.step, self.train_seconds = facts["step"], facts["train_seconds"]
        self._load_moments({key: saved.part(key) for key in MOMENTS})
        ema = saved.part("ema")
        self.ema = {
            name: sharding.cut_like(ema[name], p)
            for name, p in self._unet().named_parameters()
            if name in ema
        }
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(facts["scaler"])
        self.surgery_facts = facts["surgery"]
        self.kept = masks["kept"]
        if self.stage == "flow":
            soft = self._plain()
            soft.mask.copy_(masks["mask"])
            soft.sinusoid_scale.copy_(masks["sinusoid_scale"])
            if self.masks.state.binary:
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
                    **{key: sharding.cut_like(moments[key][name], p) for key in MOMENTS},
                }

    def _save(self) -> None:
        weights = dict(self._unet().named_parameters())
        # of weights that are cut every process has another part
        compared = {} if self.accelerator.is_fsdp2 else weights
        self._check_same("the step before a state", compared)
        masks = self.masks.state.tensors() | {"kept": self.kept}
        if self.stage == "flow":
            soft: SoftUNet = self._plain()
            masks |= {"mask": soft.mask, "sinusoid_scale": soft.sinusoid_scale}
        parts = {"model": weights, **self._moments(), "ema": self.ema, "masks": masks}
        tensors = {f"{part}/{n}": t for part, named in parts.items() for n, t in named.items()}
        scaler = self.accelerator.scaler
        self.journal.save(
            sharding.gathered(tensors, keep=self.accelerator.is_main_process),
            {
                "stage": self.stage,
                "step": self.step,
                "train_seconds": self.train_seconds,
                "surgery": self.surgery_facts,
                "masks": self.masks.state.facts(),
                "scaler": scaler and scaler.state_dict(),
                **_machine(),
            },
        )


def _machine() -> dict[str, Any]:
    """What the last bits of a result depend on."""
    return {"threads": torch.get_num_threads(), "torch": torch.__version__}
