"""Pruning runs on a tiny real UNet: keep counts, bounds, counters, and refusals."""

import copy
import json

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image

from builders import models, pruning
from builders.events import finish
from builders.quick import known_architectures
from builders.tiers import few
from compress.common.events import drain
from compress.data.sources import load_images
from compress.methods.gradflow import GradFlow, OneShot
from compress.methods.gradflow import criterion as scoring
from compress.methods.gradflow.mask_scheduler import MaskState
from compress.methods.gradflow.train import PruningRun
from compress.methods.gradflow.unets import find_groups
from compress.methods.training import Training
from compress.models.objective import validation_loss

WIDTHS = (4, 8)
# the others score in a flow, below
ONE_SHOT = ("fisher", "diff_pruning", "magnitude", "lookahead")
STEPS, RECOVER = 5, 2


def tiny_unet(**changes) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(**models.CONFIGS["resnets"] | changes)


def gradflow(**changes) -> GradFlow:
    # widths (4, 8) keep 0.2617 of the MACs
    knobs = {
        "keep_macs": 0.28,
        "steps": STEPS,
        "update_every": 1,
        "criterion_every": 2,
        "criterion_batches": 1,
        "max_move": 0.4,
        "settle": 0.2,
    }
    return GradFlow(**(knobs | changes))


def oneshot(**changes) -> OneShot:
    return OneShot(**({"keep_macs": 0.28, "steps": STEPS, "criterion_batches": 1} | changes))


def training(**changes) -> Training:
    return Training(**({"steps": RECOVER, "batch": 4, "lr": 1e-3} | changes))


def start(method, settings=None, *, unet=None, **options) -> PruningRun:
    unet = tiny_unet() if unet is None else unet
    return pruning.start(method, settings or training(), unet, **options)


def rows(run: PruningRun, stage: str) -> list[dict]:
    return [row for row in run.journal.rows if row["stage"] == stage]


METHODS = {
    "soft": gradflow(),
    "soft cubic": gradflow(budget="cubic", criterion="gradient_flow", hvp="exact"),
    "hard": gradflow(process="hard"),
    **{f"one-shot {criterion}": oneshot(criterion=criterion) for criterion in ONE_SHOT},
}

VALIDATED = ("soft", "hard", "one-shot magnitude")
# what the other criteria score is that of test_criterion.py
every_method = pytest.mark.parametrize("name", few(METHODS, *VALIDATED, "soft cubic"))


@pytest.fixture(autouse=True, scope="module")
def _known():
    with known_architectures():
        yield


@pytest.fixture(scope="module")
def finished():
    """Every method, run once; made when first asked for."""
    made = {}

    def get(name: str):
        if name not in made:
            unet = tiny_unet(dropout=0.1)
            before = copy.deepcopy(unet.state_dict())
            run = start(METHODS[name], unet=unet, validated=name in VALIDATED)
            made[name] = (run, *finish(run.events()), unet, before)
        return made[name]

    return get


# ---- what every method leaves --------------------------------------------------------------


@every_method
def test_every_block_keeps_its_quota(finished, name):
    run, _, pruned, *_ = finished(name)
    kept = run.kept
    assert ((kept == 0) | (kept == 1)).all()
    for block, count in enumerate(run.layout.keep_counts.tolist()):
        assert int(kept[run.layout.block == block].sum()) == count
    assert [row["compressed"] for row in pruned.widths] == list(WIDTHS)
    assert tuple(pruned.model.config.block_out_channels) == WIDTHS
    assert type(pruned.model) is UNet2DModel and not pruned.model.training
    with torch.no_grad():
        output = pruned.model(torch.zeros(1, 1, 8, 8), 3).sample
    assert torch.isfinite(output).all()


@every_method
def test_the_given_unet_is_not_changed(finished, name):
    *_, unet, before = finished(name)
    after = unet.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(p.grad is None for p in unet.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in unet.modules())


@every_method
def test_all_methods_take_the_same_number_of_optimiser_steps(finished, name):
    run, events, pruned, *_ = finished(name)
    assert run.total_steps == pruned.report["optimiser_steps"] == STEPS + RECOVER
    assert len(events) == STEPS + RECOVER
    logged = [row["step"] for row in run.journal.rows if row["stage"] in ("flow", "recover")]
    assert logged == list(range(1, STEPS + RECOVER + 1))
    flow = STEPS if name.startswith(("soft", "hard")) else 0
    stages = [event.stage for event in events]
    assert stages == ["flow"] * flow + ["recover"] * (STEPS + RECOVER - flow)
    for stage in set(stages):
        steps = [(e.step, e.total) for e in events if e.stage == stage]
        assert steps == [(k + 1, len(steps)) for k in range(len(steps))]


@every_method
def test_report_facts(finished, name):
    run, events, pruned, *_ = finished(name)
    report = pruned.report
    assert 0 <= report["criterion_seconds"] <= report["train_seconds"]
    share = report["criterion_seconds"] / report["train_seconds"]
    assert report["criterion_share"] == pytest.approx(share)
    facts = report["surgery"]
    assert facts["max_difference"] < 1e-5
    assert facts["loss_slim"] == pytest.approx(facts["loss_masked"], abs=1e-5)
    assert facts["groups"] == len(find_groups(run.dense))
    (row,) = rows(run, "surgery")
    assert row == {"stage": "surgery", "step": row["step"]} | facts
    assert row["step"] == (0 if name.startswith("one-shot") else STEPS)
    json.dumps([report, run.journal.rows], allow_nan=False)
    for row, event in zip(
        [r for r in run.journal.rows if r["stage"] in ("flow", "recover")], events, strict=True
    ):
        assert set(row) == {"stage", "step", "loss", "lr", "seconds"}
        assert event.values == {"loss": row["loss"], "lr": row["lr"]}
    seconds = [r["seconds"] for r in run.journal.rows if r["stage"] in ("flow", "recover")]
    assert seconds == sorted(seconds)


@pytest.mark.parametrize("name", VALIDATED)
def test_the_validation_loss_is_logged_through_the_run(finished, name):
    run, _, pruned, unet, _ = finished(name)
    flow = 0 if name.startswith("one-shot") else STEPS
    dense, *logged = rows(run, "validation")
    assert (dense["net"], dense["step"]) == ("dense", 0)
    nets = ["masked"] * flow + ["averaged"] * (STEPS + RECOVER - flow)
    assert [(row["step"], row["net"]) for row in logged] == list(enumerate(nets, start=1))
    images = run.data.held_out
    for row, model in ((dense, unet.eval()), (logged[-1], pruned.model)):
        loss = validation_loss(lambda x, t, m=model: m(x, t).sample, images, run.scheduler, draws=1)
        assert row["loss"] == pytest.approx(loss, rel=1e-5)


def test_a_run_logs_about_20_validation_losses():
    long = start(gradflow(steps=40, max_move=0.5), training(steps=61), validated=True)
    assert long.validate_every == 6  # 101 steps


def test_the_jump_at_binarisation_is_its_share_of_the_loss(finished):
    facts = finished("soft")[2].report["surgery"]
    before, after = facts["loss_before_binarise"], facts["loss_after_binarise"]
    assert facts["binarise_jump"] == pytest.approx((after - before) / before)


# ---- the mask ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["soft", "soft cubic"])
def test_no_mask_ever_moves_more_than_max_move(finished, name):
    run, _, pruned, *_ = finished(name)
    bound = METHODS[name].max_move
    moves = [row["max_move"] for row in rows(run, "mask")]
    assert len(moves) == run.mask_scheduler.binarised_at and max(moves) <= bound + 1e-6
    # independently of what the run says: the trace holds every unit of so small a model
    masks = torch.cat([torch.ones(1, run.layout.units), pruned.trace["masks"]])
    assert run.layout.units == masks.shape[1]
    soft = masks[:-1]  # the last entry is the binary mask
    assert soft.diff(dim=0).abs().max() <= bound + 1e-6
    assert 0 <= soft.min() and soft.max() <= 1


@pytest.mark.parametrize("name", ["soft", "soft cubic"])
def test_the_mask_keeps_to_its_budget_in_every_block(finished, name):
    run, _, pruned, *_ = finished(name)
    sizes, keep_counts = run.layout.sizes().double(), run.layout.keep_counts.double()
    updates = run.mask_scheduler.binarised_at
    for k, mask in enumerate(pruned.trace["masks"][:updates]):
        p = (k + 1) / updates
        removed = 3 * p**2 - 2 * p**3 if name == "soft" else 1 - (1 - p) ** 3
        wanted = sizes - removed * (sizes - keep_counts)
        sums = torch.zeros(len(keep_counts), dtype=torch.double)
        sums.index_add_(0, run.layout.block, mask.double())
        torch.testing.assert_close(sums, wanted, atol=1e-4, rtol=0)
        assert rows(run, "mask")[k]["budget"] == pytest.approx(float(mask.mean()), abs=1e-4)


def count_returns(masks: torch.Tensor) -> int:
    low, found = torch.zeros(masks.shape[1], dtype=torch.bool), 0
    for mask in masks:
        found += int((low & (mask >= 0.5)).sum())
        low = mask < 0.5
    return found


@every_method
def test_returned_units_are_counted(finished, name):
    run, _, pruned, *_ = finished(name)
    expected = count_returns(pruned.trace["masks"])
    assert pruned.report["returned_channels"] == expected
    logged = [row["returned"] for row in rows(run, "mask")]
    assert logged == sorted(logged)
    if not name.startswith("soft"):
        assert expected == 0
    assert pruned.trace["steps"].tolist() == sorted(pruned.trace["steps"].tolist())


def test_a_soft_mask_lets_units_come_back():
    # nothing drives masks to 0 or 1 and every estimate counts alone: many hover about one half
    restless = {"gamma": 0.0, "flow_rate": 0.05, "criterion_every": 1, "score_ema": 0.0}
    run = start(gradflow(steps=12, criterion="taylor", **restless), training(steps=0))
    pruned = drain(run.events())
    assert pruned.report["returned_channels"] == count_returns(pruned.trace["masks"]) > 0


def test_a_hard_mask_is_binary_and_only_falls(finished):
    run, _, pruned, *_ = finished("hard")
    masks = pruned.trace["masks"]
    assert ((masks == 0) | (masks == 1)).all()
    assert (masks.diff(dim=0) <= 0).all()
    assert masks[-1].mean() < masks[0].mean()


def test_estimates_are_compared_with_the_one_before(finished):
    ranks = [row["spearman"] for row in rows(finished("soft")[0], "mask")]
    # the first has nothing to be compared with; every optimiser step gives the next one
    assert ranks[0] is None and all(-1 <= r <= 1 for r in ranks[1:])
    # passes of its own at every second update
    ranks = [row["spearman"] for row in rows(finished("soft cubic")[0], "mask")]
    assert ranks[0] is None and all(-1 <= r <= 1 for r in ranks[2::2])
    assert all(r is None for r in ranks[1::2])


@pytest.mark.parametrize(("parts", "distill"), [(1, 0.0), (2, 3.0)])
def test_every_optimiser_step_gives_the_masks_gradient_of_its_batch(parts, distill, monkeypatch):
    run = start(gradflow(), training(distill=distill, gradient_accumulation=parts))
    with torch.no_grad():  # as far from the dense model as in a flow
        run._plain().mask.copy_(torch.linspace(0.5, 1, run.layout.units))
    learnt = []
    monkeypatch.setattr(run.mask_scheduler, "learn", learnt.append)
    examples = next(run._examples(0, 0, 1))
    batches = list(run._micro_batches(examples, 0, 0))
    mask = run._plain().mask.clone().requires_grad_()
    denoising = scoring.denoising_loss(run._plain(), run.scheduler, mask)

    def loss(batch):
        noisy = run.scheduler.add_noise(batch.images, batch.noise, batch.timesteps)
        apart = run._plain()(noisy, batch.timesteps, mask)
        apart = apart - run.dense(noisy, batch.timesteps).sample.detach()
        return denoising(batch) + distill * apart.square().mean()

    (expected,) = torch.autograd.grad(sum(loss(b) for b in batches) / parts, mask)
    run._optimise(examples)
    torch.testing.assert_close(learnt[0], expected, atol=1e-7, rtol=1e-4)


def test_a_state_of_an_earlier_version_is_refused():
    state = start(gradflow()).mask_scheduler.state
    tensors = {name: tensor for name, tensor in state.tensors().items() if name != "squares"}
    with pytest.raises(ValueError, match="without squares, .* earlier version; .*--overwrite$"):
        MaskState.restored(tensors, state.facts())


def test_scores_follow_the_mask_gradients_of_the_steps_since_the_last_update():
    run = start(gradflow(update_every=2, steps=6, score_ema=0.75))
    scheduler, soft = run.mask_scheduler, run._plain()
    scheduler.move(soft, 0)
    first = scheduler.state.scores.clone()
    taylor = start(gradflow(criterion="taylor", update_every=2, steps=6))
    taylor.mask_scheduler.move(taylor._plain(), 0)
    assert torch.equal(first, taylor.mask_scheduler.state.scores)
    gradients = torch.randn(3, run.layout.units, dtype=torch.double)
    # a step that overflowed in float16 counts as none
    for gradient in (*gradients[:2], torch.full_like(gradients[0], torch.inf)):
        scheduler.learn(gradient)
    scheduler.move(soft, 2)
    fresh = scoring.normalise(gradients[:2].square().mean(0).sqrt(), run.layout, "fisher")
    expected = 0.75 * first + 0.25 * fresh.float()
    torch.testing.assert_close(scheduler.state.scores, expected)
    scheduler.learn(gradients[2])
    scheduler.move(soft, 4)
    fresh = scoring.normalise(gradients[2].abs(), run.layout, "fisher")
    torch.testing.assert_close(scheduler.state.scores, 0.75 * expected + 0.25 * fresh.float())
    # with nothing learnt the order stays
    kept = scheduler.state.last_scores
    assert torch.equal(scheduler._learnt_scores(), kept)


@pytest.mark.parametrize("criterion", few(["taylor", "magnitude", "random"], "taylor"))
def test_the_other_criteria_work_in_the_flow_too(criterion):
    method = gradflow(criterion=criterion, steps=2, criterion_every=1)
    events, pruned = finish(start(method, training(steps=0)).events())
    assert len(events) == 2 and tuple(pruned.model.config.block_out_channels) == WIDTHS
    assert pruned.report["surgery"]["max_difference"] < 1e-5


# ---- weights -------------------------------------------------------------------------------


def test_keeping_everything_and_training_nothing_is_the_identity():
    unet = tiny_unet().eval()
    method = oneshot(keep_macs=1.0, steps=0, criterion="magnitude")
    pruned = drain(start(method, training(steps=0), unet=unet).events())
    images, times = torch.randn(3, 1, 8, 8), torch.tensor([0, 20, 49])
    with torch.no_grad():
        assert torch.equal(pruned.model(images, times).sample, unet(images, times).sample)


def test_without_training_the_weights_are_those_of_the_kept_channels():
    unet = tiny_unet()
    run = start(oneshot(steps=0, criterion="magnitude"), training(steps=0), unet=unet)
    pruned = drain(run.events())
    kept = run.layout.extend(run.kept) > 0.5
    first = unet.conv_in.weight[kept[run.layout.outputs["conv_in"]]]
    assert torch.equal(pruned.model.conv_in.weight, first)
    last = unet.conv_out.weight[:, kept[run.layout.inputs["conv_out"]]]
    assert torch.equal(pruned.model.conv_out.weight, last)


def weights_of(method, settings=None, **kwargs) -> dict[str, torch.Tensor]:
    return drain(start(method, settings, **kwargs).events()).model.state_dict()


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


def test_a_seed_decides_everything():
    method, unet = gradflow(steps=2), {"dropout": 0.1}
    first = weights_of(method, training(seed=1), unet=tiny_unet(**unet))
    torch.manual_seed(12345)
    torch.rand(7)
    assert equal(first, weights_of(method, training(seed=1), unet=tiny_unet(**unet)))
    assert not equal(first, weights_of(method, training(seed=2), unet=tiny_unet(**unet)))


def test_the_result_is_the_average_of_the_weights():
    # with decay d the average after one step is d * before + (1 - d) * after; d starts at 2/11
    def after(steps: int, ema: float) -> dict[str, torch.Tensor]:
        return weights_of(oneshot(steps=0, criterion="magnitude"), training(steps=steps, ema=ema))

    before, plain, averaged = after(0, 0.0), after(1, 0.0), after(1, 0.999)
    for key in before:
        expected = (2 * before[key] + 9 * plain[key]) / 11
        torch.testing.assert_close(averaged[key], expected, atol=1e-7, rtol=1e-6)


def test_learning_rate_warms_up_stays_and_falls_to_nothing_after_surgery(finished):
    run = start(gradflow(steps=40, max_move=0.5), training(steps=60, lr=1e-2))
    rates = [run._rate(step) for step in range(100)]
    assert rates[:40] == pytest.approx([1e-2 * min(1, (k + 1) / 20) for k in range(40)])
    assert all(a > b for a, b in zip(rates[40:], rates[41:], strict=False))
    assert rates[70] == pytest.approx(0.5e-2) and 0 < rates[-1] < 1e-5
    for name in VALIDATED:
        run = finished(name)[0]
        logged = [row["lr"] for row in run.journal.rows if "lr" in row]
        assert logged == [run._rate(k) for k in range(STEPS + RECOVER)]


def test_accumulating_gradients_changes_nothing_but_memory():
    def train(accumulation: int):
        settings = training(steps=3, gradient_accumulation=accumulation, ema=0.0)
        # all channels: in a norm group of one channel what comes before is without effect, and
        # Adam makes steps of full length out of the rounding in its gradients
        run = start(oneshot(steps=0, criterion="magnitude", keep_macs=1.0), settings)
        pruned = drain(run.events())
        return run, pruned.model

    (one, a), (two, b) = train(1), train(2)
    images, times = torch.randn(4, 1, 8, 8), torch.arange(4) * 12
    with torch.no_grad():
        torch.testing.assert_close(a(images, times), b(images, times), atol=1e-5, rtol=0)
    losses = [[row["loss"] for row in rows(run, "recover")] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    for name, weight in a.state_dict().items():
        if not name.endswith("to_k.bias"):  # likewise: softmax ignores it
            torch.testing.assert_close(weight, b.state_dict()[name], atol=1e-5, rtol=0)


def test_criterion_batches_come_in_the_parts_of_gradient_accumulation():
    method = oneshot(steps=0, criterion_batches=3)
    whole, cut = (
        start(method, training(gradient_accumulation=parts))._criterion_batches(2)
        for parts in (1, 2)
    )
    assert [len(batch.images) for batch in cut] == [2] * 6
    for k, batch in enumerate(whole):
        halves = cut[2 * k : 2 * k + 2]
        for name in ("images", "noise", "timesteps"):
            parts = [getattr(half, name) for half in halves]
            assert torch.equal(torch.cat(parts), getattr(batch, name)), name


def test_distillation_adds_to_the_loss_in_both_stages():
    runs = {
        name: start(gradflow(steps=2), training(steps=1, distill=output, **features))
        for name, output, features in (
            ("plain", 0.0, {}),
            ("output", 1.0, {}),
            ("features", 0.0, {"distill_features": 0.5}),
        )
    }
    for run in runs.values():
        drain(run.events())
        # nobody keeps watching the dense model
        assert not any(module._forward_hooks for module in run.dense.modules())
    for stage in ("flow", "recover"):
        first = {name: rows(run, stage)[0]["loss"] for name, run in runs.items()}
        # at the first step masks have hardly moved: little, but not nothing, tells the nets apart
        assert first["output"] > first["plain"] + 1e-5
        assert first["features"] > first["plain"] + 1e-5


def test_bf16_trains_on_the_cpu():
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.nn.functional.conv2d(torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3))
    except RuntimeError as error:
        pytest.skip(f"no bfloat16 on this CPU: {error}")
    # accelerate keeps one precision per process
    AcceleratorState._reset_state(True)
    try:
        run = start(gradflow(steps=2), training(steps=1, mixed_precision="bf16"))
        pruned = drain(run.events())
    finally:
        AcceleratorState._reset_state(True)
    assert {p.dtype for p in pruned.model.parameters()} == {torch.float32}
    # surgery is compared in full precision
    assert pruned.report["surgery"]["max_difference"] < 1e-5
    plain = start(gradflow(steps=2), training(steps=1))
    drain(plain.events())
    losses = [[row["loss"] for row in rows(r, "flow")] for r in (run, plain)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.05)


# ---- what is refused -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "settings", "scheduler", "message"),
    [
        (oneshot(), {"batch": 4, "gradient_accumulation": 3}, {}, "batch=4"),
        (gradflow(max_move=0.05), {}, {}, r"max_move=0\.05; raise it"),
        (oneshot(), {}, {"prediction_type": "velocity"}, "'velocity'"),
        (oneshot(keep_macs=0.05), {}, {}, r"keep_macs must be at least 0\.2.* got keep_macs=0\.05"),
        (oneshot(), {"trackers": ("notepad",)}, {}, "notepad"),
    ],
)
def test_impossible_settings_are_refused(method, settings, scheduler, message):
    with pytest.raises(ValueError, match=message):
        start(method, training(**settings), scheduler=DDPMScheduler(**scheduler))


def test_max_move_may_be_exactly_the_largest_drop():
    # one update must remove half of every block at once
    start(gradflow(steps=1, max_move=0.5, settle=0.0))
    with pytest.raises(ValueError, match=r"0\.5000"):
        start(gradflow(steps=1, max_move=0.49, settle=0.0))
    # the hard process and one-shot know no bound
    start(gradflow(steps=1, max_move=0.01, settle=0.0, process="hard"))


def test_a_loss_that_is_not_finite_stops_the_run():
    run = start(oneshot(criterion="magnitude"), training(steps=20, lr=1e30))
    with pytest.raises(ValueError, match=r"diverged; start again with a lower recover\.lr"):
        drain(run.events())


def test_validation_loss_is_the_mean_squared_error_of_the_noise():
    scheduler = DDPMScheduler(num_train_timesteps=50)
    images = torch.randn(7, 1, 4, 4)
    assert validation_loss(lambda x, t: torch.zeros_like(x), images, scheduler) == pytest.approx(
        1, abs=0.2
    )
    share = scheduler.alphas_cumprod

    def oracle(noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        kept = share[t][:, None, None, None]
        return (noisy - kept.sqrt() * images) / (1 - kept).sqrt()

    assert validation_loss(oracle, images, scheduler, draws=3) == pytest.approx(0, abs=1e-6)
    again = [validation_loss(lambda x, t: x, images, scheduler) for _ in range(2)]
    assert again[0] == again[1]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_is_lost_is_one_line_in_every_process(workers, tmp_path):
    for k in range(20):
        Image.new("L", (8, 8), 10 * k).save(tmp_path / f"{k}.png")
    data = load_images(f"folder:{tmp_path}", (8, 8), 1)
    settings = training(workers=workers)
    run = pruning.start(oneshot(), settings, tiny_unet(), data=data)
    for path in tmp_path.iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(
        ValueError, match=r"\.png should hold an image .* remove the file"
    ) as caught:
        list(run._examples(0, 0, 1))
    told = str(caught.value)
    assert "Traceback" not in told and "\n" not in told and ("train.workers" in told) == workers
