import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from animediffusion.models.augmentation.augment import AugmentConfig
from animediffusion.models.training.loop import (
    OptimizerConfig,
    TrainState,
    averaged_weights,
    fit,
    step_generator,
    write,
)
from animediffusion.models.training.objective import DenoisingConfig, DenoisingObjective, Loss
from animediffusion.pipelines.training.recipe import load_recipe

AUGMENT = AugmentConfig()


def go_on(_step):
    """No reason to stop."""


def new_state(new_denoiser, max_steps=6, **values):
    return TrainState(new_denoiser(), OptimizerConfig(**{"warmup_steps": 2, **values}), max_steps)


def train(state, new_rows, until, on_step=go_on):
    """fit() on the rows that belong to the state's steps."""
    objective = DenoisingObjective(state.denoiser, DenoisingConfig())
    batches = (new_rows(2, seed=step) for step in range(state.step, 100))
    fit(state, objective, batches, until, on_step, augment=AUGMENT, seed=3)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("muon", [None, 0.02])
def test_a_restored_run_ends_with_the_bits_of_one_that_was_not_interrupted(
    new_denoiser, new_rows, tmp_path, precision, muon
):
    values = {"precision": precision, "muon_learning_rate": muon, "ema_lengths": (0.08,)}
    whole = new_state(new_denoiser, **values)
    train(whole, new_rows, 6)
    killed = new_state(new_denoiser, **values)
    train(killed, new_rows, 3)
    killed.save(tmp_path)
    restored = TrainState(new_denoiser(seed=9), OptimizerConfig(warmup_steps=2, **values), 1)
    restored.restore(tmp_path)
    assert (restored.step, restored.max_steps) == (3, 6)
    train(restored, new_rows, 6)
    for one, other in ((whole.parameters, restored.parameters), (whole.average, restored.average)):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    whole.save(tmp_path / "whole")
    restored.save(tmp_path / "restored")
    one, other = ((tmp_path / name / "state.safetensors").read_bytes() for name in ("whole", "restored"))
    assert one == other


def test_a_checkpoint_is_safetensors_and_json(new_denoiser, tmp_path):
    new_state(new_denoiser).save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.json", "state.safetensors"]
    assert json.loads((tmp_path / "state.json").read_text()) == {"step": 0, "max_steps": 6}


def test_a_run_of_unknown_length_decays_nothing_and_its_old_checkpoints_are_read(new_denoiser, tmp_path):
    values = {"warmup_steps": 0, "learning_rate": 1e-3}
    unknown, endless = (new_state(new_denoiser, length, **values) for length in (None, 1 << 40))
    for step in (0, 1, 40, 4000):
        unknown.step = endless.step = step
        assert unknown.learning_rate() == endless.learning_rate() == 1e-3
    unknown.step = endless.step = 0
    unknown.save(tmp_path / "new")
    endless.save(tmp_path / "old")  # version 0.1 wrote 1 << 40
    for name in ("new", "old"):
        restored = new_state(new_denoiser)
        restored.restore(tmp_path / name)
        assert restored.max_steps is None


def test_a_snapshot_stays_as_it_is_while_training_continues(new_denoiser, new_rows, tmp_path):
    state = new_state(new_denoiser, muon_learning_rate=0.02)
    train(state, new_rows, 2)
    state.save(tmp_path / "saved")
    snapshot = state.snapshot()
    train(state, new_rows, 4)
    write(snapshot, tmp_path / "written")
    for name in ("state.safetensors", "state.json"):
        assert (tmp_path / "written" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()


@pytest.mark.parametrize("recipe", ["demo", "phase2", "animediffusion", "ssimbad", "animediffusion-strict"])
def test_a_checkpoint_takes_at_most_four_times_the_weights(recipe):
    config = load_recipe(recipe, ["max_steps=9"])
    network = dataclasses.replace(config.network, base_channels=32, head_channels=32, detail_channels=0)
    denoiser = config.model_copy(update={"network": network}).bundle_config(32).build()
    state = TrainState(denoiser, config.optimizer, 9)
    for parameter in state.parameters:
        parameter.grad = torch.zeros_like(parameter)
    state.apply_gradients()
    saved = sum(tensor.nbytes for tensor in state.snapshot().tensors.values())
    assert 3 < saved / sum(parameter.nbytes for parameter in state.parameters) < 4.001


@pytest.mark.parametrize("on_gpu", [False, True])
def test_muon_trains_the_weights_themselves(new_denoiser, monkeypatch, on_gpu):
    denoiser = new_denoiser()
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: on_gpu))
    state = TrainState(denoiser, OptimizerConfig(muon_learning_rate=0.02), 9)
    monkeypatch.undo()
    assert state.muon.matrices
    for parameter, matrix in state.muon.matrices.items():
        assert parameter.untyped_storage().data_ptr() == matrix.untyped_storage().data_ptr(), tuple(parameter.shape)


def test_a_checkpoint_of_another_network_raises_value_error(new_denoiser, tmp_path):
    state = new_state(new_denoiser)
    state.save(tmp_path)
    state.denoiser.network.detail.output = torch.nn.Conv2d(4, 3, 1)
    with pytest.raises(ValueError, match=r"another network: network\.detail\.output\.weight does not fit"):
        TrainState(state.denoiser, state.config, 6).restore(tmp_path)


def test_a_checkpoint_of_another_optimizer_raises_value_error(new_denoiser, new_rows, tmp_path):
    state = new_state(new_denoiser)
    train(state, new_rows, 1)
    state.save(tmp_path)
    tensors = load_file(tmp_path / "state.safetensors")
    save_file({k: v for k, v in tensors.items() if not k.startswith("optimizer.")}, tmp_path / "state.safetensors")
    with pytest.raises(ValueError, match="another optimizer: it has no state for network"):
        new_state(new_denoiser).restore(tmp_path)


def test_the_average_can_be_read_without_the_rest(new_denoiser, new_rows, tmp_path):
    state = new_state(new_denoiser)
    train(state, new_rows, 2)
    state.save(tmp_path)
    found = averaged_weights(tmp_path)
    expected = dict(state.averaged().named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_muon_moves_hidden_kernels_along_all_directions_alike_and_leaves_the_rest_to_adamw(new_denoiser, new_rows):
    state = new_state(new_denoiser, muon_learning_rate=0.02, weight_decay=0.0, warmup_steps=0)
    names = {id(p): name for name, p in state.denoiser.named_parameters()}
    hidden = {names[id(p)] for p in state.muon.matrices}
    assert "network.bottom.layers.0.conv1.weight" in hidden
    assert not any(word in name for name in hidden for word in ("input", "time_embedding", "null", "detail", "bias"))
    kernel = state.denoiser.network.bottom.layers[0].conv1.weight
    before = kernel.detach().clone()
    train(state, new_rows, 1)
    moved = torch.linalg.svdvals((kernel.detach() - before).flatten(1))
    # Five Newton-Schulz steps leave the singular values of the update between about 0.5 and 1.3 of the rate.
    assert (moved[: len(moved) // 2] / 0.02).min() > 0.5
    assert moved.max() / 0.02 < 1.4


def test_training_lowers_the_loss_of_a_fixed_batch(new_denoiser, new_rows):
    state = new_state(new_denoiser, max_steps=30, learning_rate=3e-3)
    losses = []
    objective = DenoisingObjective(state.denoiser, DenoisingConfig(time_mean=4.0, drop_reference=0.0))
    rows = new_rows(2)
    rows["reference"][:] = rows["target"]
    fit(
        state,
        objective,
        [rows] * 30,
        30,
        lambda step: losses.append(step.loss.total.item()),
        augment=AugmentConfig(cross_reference=0, rewarp=0, flip=0, recolor=0),
        seed=0,
    )
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_a_young_average_follows_quickly_and_an_old_one_slowly(new_denoiser):
    state = new_state(new_denoiser, ema_decay=0.9)
    before = state.average[0].clone()
    for step, decay in ((0, 2 / 11), (500, 0.9)):
        state.step = step
        before = state.average[0].clone()
        for parameter in state.parameters:
            parameter.grad = torch.ones_like(parameter)
        state.apply_gradients()
        expected = decay * before + (1 - decay) * state.parameters[0].detach()
        torch.testing.assert_close(state.average[0], expected)


def test_without_an_average_the_last_weights_are_saved(new_denoiser, new_rows, tmp_path):
    state = new_state(new_denoiser, ema_decay=0.0)
    train(state, new_rows, 2)
    state.save(tmp_path)
    found = averaged_weights(tmp_path)
    assert all(torch.equal(found[name], value) for name, value in state.denoiser.named_parameters())
    restored = new_state(new_denoiser, ema_decay=0.0)
    restored.restore(tmp_path)
    train(restored, new_rows, 4)
    train(state, new_rows, 4)
    assert all(torch.equal(a, b) for a, b in zip(state.parameters, restored.average, strict=True))


def test_the_averaged_model_is_a_copy_with_the_average(new_denoiser, new_rows):
    state = new_state(new_denoiser)
    train(state, new_rows, 2)
    model = state.averaged()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), state.average, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), state.parameters, strict=True))
    assert not model.training


def test_the_learning_rate_rises_then_falls_and_depends_on_the_step_alone(new_denoiser):
    state = new_state(new_denoiser, max_steps=100, learning_rate=1.0, warmup_steps=10, final_learning_rate=0.1)
    rates = []
    for step in range(101):
        state.step = step
        rates.append(state.learning_rate())
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == pytest.approx(rates[9], rel=0.03)
    assert rates[100] == pytest.approx(0.1)
    assert rates[50] == pytest.approx(0.55)
    state.step = 9
    assert state.learning_rate() == rates[9]


def test_the_cosine_may_begin_after_a_warm_up_from_the_final_rate(new_denoiser):
    state = new_state(
        new_denoiser,
        max_steps=110,
        learning_rate=1.0,
        warmup_steps=10,
        final_learning_rate=0.1,
        cosine_after_warmup=True,
    )
    rates = []
    for step in (0, 5, 10, 60, 110):
        state.step = step
        rates.append(state.learning_rate())
    assert rates == pytest.approx([0.1, 0.55, 1.0, 0.55, 0.1])


def test_without_a_limit_gradients_stay_as_they_are(new_denoiser):
    state = new_state(new_denoiser, max_grad_norm=None)
    for parameter in state.parameters:
        parameter.grad = torch.full_like(parameter, 7.0)
    kept = [parameter.grad for parameter in state.parameters]
    state.apply_gradients()
    assert all((gradient == 7).all() for gradient in kept)


def test_gradients_are_clipped_and_their_norm_before_that_is_reported(new_denoiser):
    state = new_state(new_denoiser, max_grad_norm=0.5)
    for parameter in state.parameters:
        parameter.grad = torch.ones_like(parameter)
    count = sum(parameter.numel() for parameter in state.parameters)
    assert float(state.apply_gradients()) == pytest.approx(count**0.5, rel=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(new_denoiser, new_rows):
    state = new_state(new_denoiser)
    train(state, new_rows, 2)
    before = [parameter.clone() for parameter in state.parameters]

    class Broken(torch.nn.Module):
        def forward(self, *_inputs):
            total = float("nan") * state.parameters[0].sum()
            return Loss(total, torch.zeros(8), torch.zeros(8))

    with pytest.raises(FloatingPointError, match="step 2: the loss is nan"):
        fit(state, Broken(), [new_rows(2)], 6, go_on, augment=AUGMENT, seed=0)
    assert state.step == 2
    assert all(torch.equal(a, b) for a, b in zip(before, state.parameters, strict=True))


def test_a_loss_that_is_not_finite_leaves_no_finite_gradient_for_the_other_ranks(new_denoiser, new_rows):
    state = new_state(new_denoiser)

    class Overflow(torch.nn.Module):
        def forward(self, *_inputs):
            total = float("inf") + sum(parameter.sum() for parameter in state.parameters)
            return Loss(total, torch.zeros(8), torch.zeros(8))

    with pytest.raises(FloatingPointError, match="step 0: the loss is inf"):
        fit(state, Overflow(), [new_rows(2)], 6, go_on, augment=AUGMENT, seed=0)
    assert not any(parameter.grad.isfinite().any() for parameter in state.parameters)


def test_a_checkpoint_with_momentum_in_float32_is_restored(new_denoiser, new_rows, tmp_path):
    state = new_state(new_denoiser, muon_learning_rate=0.02)
    train(state, new_rows, 2)
    state.save(tmp_path)
    tensors = load_file(tmp_path / "state.safetensors")
    old = {key: value.float() if ".momentum_buffer." in key else value for key, value in tensors.items()}
    save_file(old, tmp_path / "state.safetensors")
    restored = new_state(new_denoiser, muon_learning_rate=0.02)
    restored.restore(tmp_path)
    for name, parameter in zip(restored.names, restored.parameters, strict=True):
        if parameter in restored.momentum:
            assert torch.equal(restored.momentum[parameter], tensors[f"optimizer.momentum_buffer.{name}"])


def test_gradients_that_are_not_finite_change_nothing(new_denoiser, new_rows):
    state = new_state(new_denoiser)
    train(state, new_rows, 2)
    before = [p.clone() for p in [*state.parameters, *state.average]]
    for parameter in state.parameters:
        parameter.grad = torch.full_like(parameter, float("inf"))
    with pytest.raises(FloatingPointError, match="step 2: the norm of the gradients is inf"):
        state.apply_gradients()
    assert all(torch.equal(a, b) for a, b in zip(before, [*state.parameters, *state.average], strict=True))
    assert state.step == 2


def test_a_run_stops_at_the_step_it_is_told_or_when_the_caller_says_so_or_without_rows(new_denoiser, new_rows):
    state, seen = new_state(new_denoiser), []
    train(state, new_rows, 2, lambda step: seen.append(step.step))
    assert (state.step, seen) == (2, [1, 2])
    train(state, new_rows, 6, lambda step: step.step == 3)
    assert state.step == 3
    objective = DenoisingObjective(state.denoiser, DenoisingConfig())
    fit(state, objective, [new_rows(2)], 6, go_on, augment=AUGMENT, seed=3)
    assert state.step == 4
    train(state, new_rows, 4)
    assert state.step == 4


def test_random_numbers_differ_by_seed_step_and_rank_and_repeat():
    def draw(*key):
        return torch.rand(4, generator=step_generator(*key)).tolist()

    keys = [(seed, step, rank) for seed in range(4) for step in range(4) for rank in range(4)]
    assert len({tuple(draw(*key)) for key in keys}) == len(keys)
    assert draw(1, 2, 3) == draw(1, 2, 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"precision": "fp16"}, "bf16 or fp32"),
        ({"ema_decay": 1.0}, r"\[0, 1\)"),
        ({"learning_rate": 0.0}, "above 0"),
        ({"warmup_steps": -1}, "not be negative"),
        ({"betas": (0.9, 1.0)}, "betas"),
    ],
)
def test_impossible_optimizer_settings_raise_value_error(values, message):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**values)
