"""Determine on a CPU which inputs xformers accepts on each kind of GPU; a script that prints JSON.

The script makes xformers assume that CUDA is available and that its library is loaded. Tensors are fake, so that no
kernel runs. An operator of xformers either raises NotImplementedError or chooses a kernel; the script records which.
"""

from __future__ import annotations

import json
from unittest import mock

import torch
from torch._subclasses import fake_tensor

from animediffusion.models.network import attention, unet
from animediffusion.pipelines.training.recipe import load_recipe, recipe_names

CARDS = {
    "T4": (7, 5),
    "A100": (8, 0),
    "A10": (8, 6),
    "L4": (8, 9),
    "H100": (9, 0),
    "B200": (10, 0),
    "RTX 5090": (12, 0),
}
DTYPES = (torch.float32, torch.bfloat16)
SIZES = (64, 256)
ODD = tuple((((2, 8, 2, 6), strides),) * 3 for strides in ((96, 12, 6, 1), (192, 24, 12, 2), (96, 6, 48, 1)))
"""Head sizes and strides that no recipe uses."""


def networks_inputs():
    """Return (shape, strides) of query, key and value of every attention of every recipe."""
    found = set()

    def record(*qkv):
        found.add(tuple((tuple(x.shape), x.stride()) for x in qkv))
        return attention.attention(*qkv)

    configs = {load_recipe(recipe).bundle_config(SIZES[0]).network for recipe in recipe_names()}
    with torch.no_grad(), torch.device("meta"), mock.patch.object(unet, "attention", record):
        for network in map(unet.UNet, configs):
            for size in SIZES:
                sketch, reference = torch.empty(2, 1, size, size), torch.empty(2, 3, size, size)
                network.denoise(torch.empty_like(reference), torch.rand(2), network.encode(sketch, reference))
    return sorted(found)


def tensors(inputs, dtype, trained):
    return [torch.empty_strided(*one, dtype=dtype, device="cuda", requires_grad=trained) for one in inputs]


def own_answer(fmha, trained, query, key, value):
    """Return whether xformers itself rejects the inputs."""
    lse = torch.empty(query.shape[0], query.shape[2], query.shape[1], device="cuda")
    calls = [lambda: fmha.memory_efficient_attention(query, key, value)]
    if trained:
        context = fmha.Context(lse=lse, out=query)
        inputs = fmha.Inputs(query, key, value)
        calls.append(lambda: fmha._memory_efficient_attention_backward(context, inputs, query, None))
    return any(is_unsupported(call) for call in calls)


def is_unsupported(call):
    try:
        call()
    except NotImplementedError:
        return True
    except Exception:  # xformers chose a kernel that is not in this build of torch
        return False
    return False


def ran_by_us(fmha, qkv):
    """Return the backend that attention() calls."""
    sdpa = "torch.nn.functional.scaled_dot_product_attention"
    attention._used.clear()
    with mock.patch.object(fmha, "memory_efficient_attention"), mock.patch(sdpa):
        attention.attention(*qkv)
    return attention.attention_used()


def put(card):
    """Make torch report the compute capability of that GPU from now on."""
    torch.cuda.get_device_capability = lambda _device=None: CARDS[card]
    attention._unsupported.clear()


def explanations():
    for card in CARDS:
        put(card)
        with fake_tensor.FakeTensorMode():
            yield card, attention.explain_attention()


def answers():
    from xformers.ops import fmha

    inputs_of_all = [*networks_inputs(), *ODD]
    for card in CARDS:
        put(card)
        for inputs in inputs_of_all:
            for dtype in DTYPES:
                for trained in (False, True):
                    with fake_tensor.FakeTensorMode():
                        qkv = tensors(inputs, dtype, False)
                        yield {
                            "card": card,
                            "inputs": str(inputs),
                            "dtype": str(dtype).removeprefix("torch."),
                            "trained": trained,
                            "unsupported": own_answer(fmha, trained, *qkv),
                            "ours": not attention._is_for_xformers(*tensors(inputs, dtype, trained)),
                            "ran": "" if trained else ran_by_us(fmha, qkv),
                        }


def main():
    torch.cuda.is_available = torch.backends.cuda.is_flash_attention_available = lambda: True
    put("A100")
    torch.version.cuda = "12.8"
    fake_tensor.init_gpu_context = lambda _device: None
    with fake_tensor.FakeTensorMode():
        installed = attention.explain_attention()
    from xformers import _cpp_lib
    from xformers.ops.fmha import common

    _cpp_lib._cpp_library_load_exception, common._built_with_cuda = None, True
    attention._xformers_problem.cache_clear()
    explained = dict(explanations())
    print(json.dumps({"installed": installed, "explained": explained, "answers": list(answers())}))


if __name__ == "__main__":
    main()
