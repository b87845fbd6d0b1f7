"""One pruning run: soft flow, binarisation, surgery, recovery; resumable at any step."""

import contextlib
import math
import re
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from compress.common.journal import Saved, Tensors
from compress.data.batches import Batch, Examples, StepSampler, flipped
from compress.data.sources import Pairs, stacked
from compress.methods.base import Event, Pruned, PruneJob
from compress.methods.gradflow import criterion as scoring
from compress.methods.gradflow import depth, surgery
from compress.methods.gradflow.allocation import plan
from compress.methods.gradflow.distill import Teacher
from compress.methods.gradflow.groups import UNet
from compress.methods.gradflow.layout import Layout
from compress.methods.gradflow.mask_scheduler import MaskScheduler, MaskState
from compress.methods.gradflow.masks import SoftUNet
from compress.methods.gradflow.sinusoid import narrowed
from compress.methods.gradflow.unets import find_groups
from compress.models.objective import (
    VALIDATED_AT_ONCE,
    check_trainable,
    drop_jointly,
    inputs_of,
    noise_schedule,
    predicted,
    prediction_target,
    validation_loss,
)
from compress.models.pipelines import denoiser, placed
from compress.parallel import distributed, sharding

if TYPE_CHECKING:
    from compress.methods.gradflow.method import ChannelPruning

WARM_UP = 20
COMPARED = 64
# validation losses that are logged over a run, each on COMPARED images: a few per cent of its time
VALIDATIONS = 20
MOMENTS = ("exp_avg", "exp_avg_sq")


def prune(method: "ChannelPruning", job: PruneJob) -> Generator[Event, None, Pruned]:
    """Prune the denoiser of a pipeline, which is unchanged and on its device again at the end.

    Yields
    ------
    Event : "prepare" with the widths, when everything is checked and nothing is written; then one
        for each optimiser step.
    """
    check_trainable(job.pipeline)
    _, unet = denoiser(job.pipeline)
    with placed([unet, *inputs_of(job.pipeline).modules], job.device):
        run = PruningRun(method, job)
        yield Event(
            "prepare",
            1,
            1,
            message=f"{surgery.summary(unet, run.layout)}, {run.total_steps} optimiser steps",
        )
        return (yield from run.events())


def _predicted(
    call: Callable[..., Any],
    model: nn.Module,
    noisy: torch.Tensor,
    timesteps: torch.Tensor,
    condition: Mapping[str, Any],
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The prediction of a denoiser or a soft one: ``call`` is the forward pass of ``model``."""
    if isinstance(model, SoftUNet):
        return call(noisy, timesteps, mask, condition)
    return predicted(call, noisy, timesteps, condition)


def _unet_of(model: nn.Module) -> Any:
    """The UNet inside a soft one, or the model itself."""
    return model.unet if isinstance(model, SoftUNet) else model


class PruningRun:
    """Prunes one UNet with :class:`GradFlow` or :class:`OneShot`, on one process or several.

    All processes hold the same masks and scores, and the same weights or, with FSDP, a part of
    each. Every one has its share of every batch; gradients, those of the criterion too, are
    averaged. Batches, noise, timesteps and flips are functions of (seed, step, sample), so the
    number of processes changes rounding only; dropout draws by (seed, step, process). Checksums are
    compared whenever the mask moves, after surgery and before each state.

    Parameters
    ----------
    method : the knobs.
    job : what to prune, on which data; its ``device`` is a process's own where there are several.
    """

    def __init__(self, method: "ChannelPruning", job: PruneJob) -> None:
        self.method, self.data = method, job.data
        self.training, self.journal = job.training, job.journal
        self.scheduler = noise_schedule(job.pipeline.scheduler)
        self.inputs = inputs_of(job.pipeline)
        self.inputs.check(self.data)
        training, journal, (_, unet) = job.training, job.journal, denoiser(job.pipeline)
        self.accelerator = Accelerator(
            mixed_precision=training.mixed_precision,
            gradient_accumulation_steps=training.gradient_accumulation,
            log_with=list(training.trackers) or None,
            project_dir=journal.folder and journal.folder / "trackers",
            cpu=job.device == "cpu",
            device_placement=False,  # it knows no other GPU than the first
        )
        training.check_batch(self.accelerator.num_processes)
        sharding.gather_in_float32(self.accelerator)
        sharding.check_blocks(self.accelerator, unet)
        self.device = torch.device(job.device)
        self.dense = unet.to(self.device).eval()
        self.inputs.to(self.device)
        layout, allocator = plan(unet, find_groups(unet), method)
        # what training starts from; a class with free widths can have the whole sinusoid
        length = self.scheduler.config.num_train_timesteps
        whole = allocator or depth.stacks_of(unet)
        self.first = unet if whole else narrowed(unet, layout.widths[0], length)
        self.mask_scheduler = MaskScheduler(
            method,
            layout,
            self.scheduler,
            self._criterion_batches,
            step_rate=training.lr,
            seed=training.seed,
            device=self.device,
            allocator=allocator,
        )
        self.flow_steps = method.flow.steps if method.flow else 0
        self.total_steps = method.steps + training.steps
        self.validate_every = math.ceil(self.total_steps / VALIDATIONS)
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
            (method, training, layout.widths, len(self.data.train), saved and saved.facts),
        )
        self._enter(saved)

    @property
    def layout(self) -> Layout:
        """Where each unit acts, with the current keep counts, which move where widths are free."""
        return self.mask_scheduler.layout

    # ---- what happens, in order -------------------------------------------------------------

    def events(self) -> Generator[Event, None, Pruned]:
        """Run to the end; yields an event per optimiser step and returns the pruned model.

        Nothing is written to the journal's folder before this.
        """
        self.journal.begin()
        if self.training.trackers:
            self.accelerator.init_trackers("compress")
        if self.stage == "flow":
            if self.step == 0:
                self._log_validation("dense", self.dense)
            if self.flow_steps:
                yield from self._steps("flow", self.flow_steps)
            else:
                self._score_once()
            self._operate()
            self._save()
        yield from self._steps("recover", self.total_steps)
        if self.training.trackers:
            self.accelerator.end_training()
        widths = surgery.width_rows(self.dense, self.layout, self.kept)
        return Pruned(self._averaged(), widths, self._report(), self.mask_scheduler.trace())

    def _steps(self, stage: str, stop: int) -> Iterator[Event]:
        batches = self._examples(self.training.seed, self.step, stop)
        first = 0 if stage == "flow" else self.flow_steps
        while self.step < stop:
            started = time.perf_counter()
            if stage == "flow":
                self._move_mask()
            loss = self._optimise(next(batches))
            if not math.isfinite(loss):
                raise ValueError(
                    f"the loss should be finite; it became {loss} at optimiser step {self.step}: "
                    "training diverged; start again with a lower recover.lr and --overwrite"
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
            if self.step % self.validate_every == 0 or self.step == self.total_steps:
                self._validate()
            if self.step % self.training.save_every == 0 or self.step == self.total_steps:
                self._save()
            yield Event(stage, self.step - first, stop - first, values)

    def _optimise(self, examples: Examples) -> float:
        """One optimiser step on this process's share of the global batch."""
        # dropout, if there is any
        process = self.accelerator.process_index
        torch.manual_seed((self.training.seed * 1_000_003 + self.step + process * 2**40) % 2**63)
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate(self.step)
        if self.training.flip:
            first = process * len(examples.images)
            images = flipped(examples.images, self.training.seed, self.step, first)
            examples = examples._replace(images=images)
        learns = self.stage == "flow" and self.mask_scheduler.learns
        mask = self._mask().detach().clone().requires_grad_() if learns else None
        # of this step's gradients, whose optimiser step may change it
        scale = self.accelerator.scaler.get_scale() if self.accelerator.scaler else 1.0
        total = 0.0
        for batch in self._micro_batches(examples, self.training.seed, self.step):
            with self.accelerator.accumulate(self.model):
                noisy = self.scheduler.add_noise(batch.images, batch.noise, batch.timesteps)
                with self.teacher.watch(self._unet()) as features:
                    found = _predicted(
                        self.model, self._plain(), noisy, batch.timesteps, batch.condition, mask
                    )
                loss = F.mse_loss(found.float(), prediction_target(self.scheduler, batch))
                loss = loss + self.teacher.loss(
                    noisy, batch.timesteps, found, features, self._mask(), batch.condition
                )
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.optimizer.zero_grad()
                total += loss.item() / self.training.gradient_accumulation
        if mask is not None and mask.grad is not None:
            self.mask_scheduler.learn(mask.grad / scale)
        return distributed.mean_value(total, self.device)

    # ---- binarisation and surgery -----------------------------------------------------------

    def _binarise(self, soft: SoftUNet) -> None:
        with sharding.whole(soft):
            before = self._held_out_loss(soft)
            switched = self.mask_scheduler.binarise(soft, self.step)
            after = self._held_out_loss(soft)
            self.surgery_facts = {
                "loss_before_binarise": before,
                "loss_after_binarise": after,
                "binarise_jump": after / before - 1,
                "switched_norms": switched,
            }

    def _move_mask(self) -> None:
        """Before an optimiser step: move the mask when it is due, binarise at the end."""
        soft = self._plain()
        row = self.mask_scheduler.move(soft, self.step)
        if row is not None:
            self.journal.log(stage="mask", step=self.step, **row)
            self._check_same("the mask moved", {"mask": soft.mask})
        if self.step == self.mask_scheduler.binarised_at:
            self._binarise(soft)

    def _score_once(self) -> None:
        """Score the dense model and choose the kept units at once."""
        soft = self._plain()
        self.mask_scheduler.estimate(soft)
        self.mask_scheduler.allocate()
        self.train_seconds += self.mask_scheduler.state.seconds
        self._binarise(soft)

    def _operate(self) -> None:
        """Surgery: the masked network becomes a plain slim one; Adam's moments are cut alike."""
        soft: SoftUNet = self._plain()
        if not self.mask_scheduler.state.binary:
            self._binarise(soft)
        with sharding.whole(soft):  # what is changed inside is gone where weights are cut
            self.mask_scheduler.refit(soft)
            slim = surgery.perform(soft.unet, self.layout, soft.mask)
            self.surgery_facts |= {
                "max_difference": self._max_difference(soft, slim),
                "loss_masked": self._held_out_loss(soft),
                "loss_slim": self._held_out_loss(slim),
                "groups": len(self.layout.groups),
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
        length = self.scheduler.config.num_train_timesteps
        batch = self.inputs.batch(self._held_out(COMPARED), length, self.training.seed, 0)
        images, condition = batch.images, batch.condition
        times = torch.linspace(0, length - 1, len(images), device=self.device).long()
        soft.eval()
        slim.eval()
        with torch.no_grad(), scoring.full_precision():
            masked = SoftUNet.forward(soft, images, times, condition=condition)
            return (masked - predicted(slim, images, times, condition)).abs().max().item()

    # ---- small pieces -----------------------------------------------------------------------

    def _check_same(self, when: str, tensors: Tensors) -> None:
        tensors = tensors | {"scores": self.mask_scheduler.state.scores}
        distributed.check_same(f"masks, scores and weights after {when}", tensors, self.step)

    def _rate(self, step: int) -> float:
        """Warm-up, constant until surgery, then a cosine to 0: one rule for every method."""
        after = max(0, step - self.flow_steps) / max(1, self.total_steps - self.flow_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * after))
        return self.training.lr * min(1.0, (step + 1) / WARM_UP) * cosine

    def _micro_batches(self, examples: Examples, seed: int, step: int) -> Iterator[Batch]:
        """Our share of a global batch, in the parts of gradient accumulation."""
        first = self.accelerator.process_index * len(examples.images)
        for part in examples.chunk(self.training.gradient_accumulation):
            yield self.inputs.batch(
                part,
                self.scheduler.config.num_train_timesteps,
                seed,
                step,
                first,
                self.training.batch,
                dropout=self.training.condition_dropout,
            )
            first += len(part.images)

    def _examples(self, seed: int, start: int, stop: int) -> Iterator[Examples]:
        """Our share of the batches of steps ``start`` to ``stop``, functions of (seed, step)."""
        sampler = StepSampler(
            len(self.data.train),
            self.training.batch,
            seed,
            start,
            stop,
            self.accelerator.process_index,
            self.accelerator.num_processes,
        )
        workers = self.training.workers
        loader = DataLoader(
            Pairs(self.data.train, self.data.train_conditions),
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=stacked,
            prefetch_factor=self.training.prefetch if workers else None,
            pin_memory=self.device.type == "cuda",
        )
        try:
            for examples in loader:
                yield examples.to(self.device)
        except Exception as error:
            if not workers:
                raise
            # torch hands on the traceback of a worker as one text, whose last line is the error
            [*_, last] = re.split(r"\n|\\n", str(error).strip().removesuffix(r"\n"))
            raise ValueError(
                f"{workers} processes of train.workers should read the images; one failed: "
                f"{last}; with train.workers 0 they are read without"
            ) from error

    def _criterion_batches(self, number: int) -> list[Batch]:
        """Our share of the minibatches of estimate ``number``, a function of (seed, number).

        In the parts of gradient accumulation: what fits into memory there fits here.
        """
        seed, count = self.training.seed + 7919, self.method.criterion_batches
        first = number * count
        examples = self._examples(seed, first, first + count)
        return [
            batch
            for step, part in enumerate(examples, start=first)
            for batch in self._micro_batches(part, seed, step)
        ]

    def _held_out(self, count: int) -> Examples:
        pairs = Pairs(self.data.held_out, self.data.held_out_conditions)
        return stacked(pairs[i] for i in range(min(count, len(pairs)))).to(self.device)

    def _validate(self) -> None:
        """Log the validation loss of what trains: the masked network, then the average."""
        if self.stage == "flow":
            with sharding.whole(self._plain()):
                self._log_validation("masked", self._plain())
        else:
            self._log_validation("averaged", self._averaged().to(self.device))

    def _log_validation(self, net: str, model: nn.Module) -> None:
        loss = self._held_out_loss(model, COMPARED)
        self.journal.log(stage="validation", step=self.step, net=net, loss=loss)

    def _held_out_loss(self, model: nn.Module, count: int = VALIDATED_AT_ONCE) -> float:
        """Validation loss on the first held-out images with one noise draw: cheap."""
        training = model.training
        model.eval()
        held_out = self._held_out(count)
        # called on the class: accelerate's own forward enters autocast
        call = partial(type(model).forward, model)
        loss = validation_loss(
            lambda noisy, t, **condition: _predicted(call, model, noisy, t, condition),
            held_out.images,
            self.scheduler,
            draws=1,
            inputs=self.inputs,
            conditions=held_out.conditions,
        )
        model.train(training)
        return loss

    def _average(self) -> None:
        since = self.step - self.flow_steps
        decay = min(self.training.ema, (1 + since) / (10 + since))
        with torch.no_grad():
            for name, p in self._plain().named_parameters():
                self.ema[name].lerp_(p, 1 - decay)

    def _averaged(self) -> UNet:
        slim = surgery.slim_unet(self.first, self.layout, self.kept)
        ema = {n: t.cpu() for n, t in sharding.gathered(self.ema).items()}
        return surgery.filled(slim, ema).eval()

    def _plain(self) -> Any:
        return self.accelerator.unwrap_model(self.model)

    def _unet(self) -> UNet:
        """The UNet that holds the trained parameters."""
        return _unet_of(self._plain())

    def _mask(self) -> torch.Tensor:
        """The mask while it moves, the kept units after surgery."""
        plain = self._plain()
        return plain.mask if isinstance(plain, SoftUNet) else self.kept

    def _report(self) -> dict[str, Any]:
        state = self.mask_scheduler.state
        return {
            "train_seconds": self.train_seconds,
            "criterion_seconds": state.seconds,
            "criterion_share": state.seconds / max(self.train_seconds, 1e-9),
            "optimiser_steps": self.step,
            "returned_channels": state.returned,
            "surgery": {k: v if math.isfinite(v) else None for k, v in self.surgery_facts.items()},
            "kept_blocks": depth.kept_blocks(self.dense, self.layout, self.kept),
        }

    # ---- state ------------------------------------------------------------------------------

    def _prepare(self, model: Any) -> None:
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=self.training.lr, weight_decay=0.0, fused=True
        )
        model.train()
        drop_jointly(model)
        if self.training.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        masked = isinstance(model, SoftUNet)
        with sharding.one_unit(self.accelerator) if masked else contextlib.nullcontext():
            self.model, self.optimizer = self.accelerator.prepare(model, optimizer)

    def _enter(self, saved: Saved | None) -> None:
        """Start at the beginning, or at a saved state."""
        self.kept = torch.zeros(0, device=self.device)
        self.stage = "flow" if saved is None else saved.facts["stage"]
        if saved is not None:
            masks = {name: t.to(self.device) for name, t in saved.part("masks").items()}
            self.mask_scheduler.state = MaskState.restored(masks, saved.facts["masks"])
        if self.stage == "flow":
            model: Any = SoftUNet(self.first, self.layout)
        else:
            model = surgery.slim_unet(self.first, self.layout, masks["kept"])
        if saved is not None:
            weights = saved.part("model")
            with torch.no_grad():
                for name, p in _unet_of(model).named_parameters():
                    p.copy_(weights[name])
        self._prepare(model.to(self.device))
        if saved is None:
            return
        facts = saved.facts
        self._check_same_machine(facts)
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
            if self.mask_scheduler.state.binary:
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
                    "step": torch.tensor(float(self.step), device=self.device),
                    "exp_avg": sharding.cut_like(moments["exp_avg"][name], p),
                    "exp_avg_sq": sharding.cut_like(moments["exp_avg_sq"][name], p),
                }

    def _save(self) -> None:
        weights = dict(self._unet().named_parameters())
        # of weights that are cut every process has another part
        compared = {} if self.accelerator.is_fsdp2 else weights
        self._check_same("the step before a state", compared)
        tensors = {f"model/{n}": t for n, t in weights.items()}
        for key, moments in self._moments().items():
            tensors |= {f"{key}/{n}": t for n, t in moments.items()}
        tensors |= {f"ema/{n}": t for n, t in self.ema.items()}
        masks = self.mask_scheduler.state.tensors() | {"kept": self.kept}
        if self.stage == "flow":
            masks["mask"] = self._plain().mask
        tensors |= {f"masks/{n}": t for n, t in masks.items()}
        tensors = sharding.gathered(tensors, keep=self.accelerator.is_main_process)
        scaler = self.accelerator.scaler
        self.journal.save(
            tensors,
            {
                "stage": self.stage,
                "step": self.step,
                "train_seconds": self.train_seconds,
                "surgery": self.surgery_facts,
                "masks": self.mask_scheduler.state.facts(),
                "scaler": scaler and scaler.state_dict(),
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
