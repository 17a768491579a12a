"""What of an error of a worker becomes the line that a run ends with."""

from types import SimpleNamespace

import pytest
import ray
import torch

from animediffusion.pipelines.training.driver import reason

CUDA = """CUDA error: no kernel image is available for execution on the device
Search for `cudaErrorNoKernelImageForDevice' in https://docs.nvidia.com/cuda/cuda-runtime-api/group.html for more.
CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.
For debugging consider passing CUDA_LAUNCH_BLOCKING=1
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.
"""
COMPILER = """backend='inductor' raised:
RuntimeError: Triton Error [CUDA]: device kernel image is invalid

Set TORCHDYNAMO_VERBOSE=1 for the internal stack trace (please do this especially if you're reporting a bug).
"""
NCCL = """NCCL error in: NCCLUtils.cpp:94, unhandled system error (run with NCCL_DEBUG=INFO for more), version 2.27.5
ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.
Last error:
socketStartConnect: Connect to 10.0.0.7<41235> failed : Connection refused
"""


NO_MEMORY = """Task was killed due to the node running low on memory.
Memory on the node (IP: 10.0.0.7, ID: 5f) where the task was running was 23.1GB / 24.0GB (0.96), which exceeds 0.95.
Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/debug-memory.html. To adjust
the kill threshold, set the environment variable `RAY_memory_usage_threshold` when starting Ray.
"""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (torch.AcceleratorError(CUDA), CUDA.splitlines()[0]),
        (RuntimeError(COMPILER), COMPILER.splitlines()[1]),
        (RuntimeError(NCCL), NCCL.splitlines()[-1]),
        (RuntimeError("Traceback (most recent call last):\n  File ...\nOSError: no space\n"), "OSError: no space"),
        (RuntimeError(""), "RuntimeError"),
        (ray.exceptions.OutOfMemoryError(NO_MEMORY), "a node had almost no memory left, so Ray ended a process there"),
    ],
)
def test_it_is_what_went_wrong_and_not_torchs_advice(error, line):
    assert reason(SimpleNamespace(worker_failures={1: error})) == line


def test_it_is_that_of_the_worker_that_failed_and_not_of_those_that_lost_it():
    lost = RuntimeError("[/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")
    assert reason(SimpleNamespace(worker_failures={0: lost, 1: OSError("no space left"), 2: lost})) == "no space left"
    assert reason(SimpleNamespace(worker_failures={0: lost})) == str(lost)
