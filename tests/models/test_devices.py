"""A training step of each recipe on tensors of an accelerator that is not there: no devices mix, the host rarely waits.

FakeTensorMode knows shapes, dtypes and devices and computes nothing. torch builds without CUDA cannot run backward for
"cuda", so the accelerator is a Python-only one, named gpu. It stays for the life of a process: this file runs itself.
"""

import contextlib
import json
import os
import subprocess
import sys
import traceback

import pytest
import torch

RECIPES = ("phase1", "phase2", "starter", "animediffusion", "animediffusion-phase2", "animediffusion-strict", "ssimbad")
MOST_WAITS = 1
"""Times a step's host waits for the device: one read of the loss and the norm."""


@pytest.fixture(scope="module")
def waits():
    """The waits of a step by recipe, or the error of the step."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_training_step_mixes_no_devices_and_hardly_waits(waits, recipe):
    found = waits[recipe]
    assert isinstance(found, list), found
    assert 0 < len(found) <= MOST_WAITS, found


def main():
    torch.utils.backend_registration._setup_privateuseone_for_python_backend("gpu")
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    from animediffusion.models.training import loop as training
    from animediffusion.models.training import objective
    from animediffusion.pipelines.training.recipe import load_recipe

    aten, make = torch.ops.aten, torch.tensor
    waits = []

    def wait(reason):
        caller = sys._getframe(2)
        while "animediffusion" not in caller.f_code.co_filename and caller.f_back is not None:
            caller = caller.f_back
        waits.append(f"{reason} {os.path.basename(caller.f_code.co_filename)}:{caller.f_lineno}")

    def on_gpu(value):
        return isinstance(value, torch.Tensor) and value.device.type == "gpu"

    class Looks(TorchDispatchMode):
        """Answers where the host asks for a value, and counts where it asks the device."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            first = args[0] if args else None
            if func is aten._local_scalar_dense.default:
                if on_gpu(first):
                    wait("a number is read")
                return {torch.bool: False, torch.int64: 1}.get(first.dtype, 0.5)
            if func is aten.nonzero.default:
                if on_gpu(first):
                    wait("numbers of rows are read")
                return torch.zeros(first.numel(), first.ndim, dtype=torch.int64, device=first.device)
            if func is aten._to_copy.default and kwargs.get("device") is not None:
                there = torch.device(kwargs["device"]).type == "gpu"
                if on_gpu(first) != there and not (there and kwargs.get("non_blocking")):
                    wait("a copy")
            if func is aten.copy_.default and on_gpu(args[1]) != on_gpu(first) and not (args[2:] or kwargs):
                wait("a copy in place")
            return func(*args, **kwargs)

    def tensor(data, *, dtype=None, device=None):
        made = make(data, dtype=dtype, device="cpu")
        if device is None or torch.device(device).type == "cpu":
            return made
        wait("a list is copied")
        return torch.empty_like(made, device=device)

    def to_list(self):
        if on_gpu(self):
            wait("numbers are read")
        return [0.5] * self.numel()

    def generator(seed, step, rank, device="cpu"):
        return torch.Generator().manual_seed(0) if torch.device(device).type == "cpu" else None

    torch.tensor = tensor  # of a list, on a device without kernels
    FakeTensor.tolist = to_list
    torch.Tensor.new_tensor = lambda self, data, dtype=None: tensor(data, dtype=dtype or self.dtype, device=self.device)
    torch.autocast = lambda *_, **__: contextlib.nullcontext()
    objective.checkpoint = lambda function, *args, **_: function(*args)
    training.step_generator = generator

    def step(recipe):
        config = load_recipe(recipe, ["max_steps=9", "init_from=null", "optimizer.precision=fp32"])
        with FakeTensorMode(), Looks():
            with torch.device("gpu"):
                denoiser = config.bundle_config(64).build()
            state = training.TrainState(denoiser, config.optimizer, 9)
            phase = config.objective.build(denoiser, config.bundle_config(64).sampler, 0)
            shape = (4, 64, 64, 3)
            pictures = {
                name: torch.zeros(shape, dtype=torch.uint8, device="gpu")
                for name in ("target", "reference", "cross_reference")
            }
            # On the host, as pipelines/data/decoding.py gives them.
            flags = {f"has_{name}": torch.zeros(4, dtype=torch.bool) for name in ("sketch", "reference", "cross")}
            rows = {**pictures, **flags, "sketch": pictures["target"][..., 0]}
            denoiser.path.alpha(torch.zeros(1, device="gpu"))  # a path's table is copied once
            before = len(waits)
            training.fit(state, phase, [rows], 1, lambda _: None, augment=config.augment, seed=0)

        return waits[before:]

    found = {}
    for recipe in RECIPES:
        try:
            found[recipe] = step(recipe)
        except Exception:
            found[recipe] = traceback.format_exc()[-2000:]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
