import itertools
import json
import logging
import os
import subprocess
import sys

import pytest
import torch
import xformers_cards

from animediffusion.models.network import attention as module
from animediffusion.models.network.attention import (
    PLAIN_LIMIT,
    attention,
    attention_used,
    expected_attention,
    explain_attention,
    use_attention,
)


@pytest.mark.parametrize(("queries", "keys"), [(5, 7), (500, PLAIN_LIMIT // 400)])
def test_attention_is_the_plain_softmax_formula(queries, keys):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, queries, 3, 8, generator=generator, dtype=torch.float64)
    key, value = (torch.randn(2, keys, 3, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = torch.einsum("bmhk,bnhk->bhmn", query, key).div(8**0.5).softmax(-1)
    plain = torch.einsum("bhmn,bnhk->bmhk", weights, value)
    torch.testing.assert_close(attention(query, key, value), plain)
    assert "sdpa" in attention_used()


def test_attention_compiles_as_one_graph():
    query, key = torch.randn(2, 5, 3, 8), torch.randn(2, 7, 3, 8)
    compiled = torch.compile(attention, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, key, key), attention(query, key, key))


def test_an_unknown_backend_is_rejected():
    with pytest.raises(ValueError, match="auto, xformers or sdpa, got 'flash'"):
        use_attention("flash")


def test_without_cuda_torch_is_expected_and_xformers_rejected():
    assert expected_attention() == "sdpa"
    assert "it needs CUDA" in explain_attention()
    with pytest.raises(ValueError, match="needs CUDA"):
        use_attention("xformers")


@pytest.fixture(scope="module")
def cards():
    """The answers of tests/xformers_cards.py."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, xformers_cards.__file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_auto_takes_xformers_exactly_where_xformers_itself_does(cards):
    assert [one for one in cards["answers"] if one["ours"] != one["unsupported"]] == []


@pytest.mark.slow
def test_what_xformers_does_not_support_runs_on_torch(cards):
    ran = {(one["unsupported"], one["ran"]) for one in cards["answers"] if not one["trained"]}
    assert ran == {(True, "sdpa"), (False, "xformers")}


@pytest.mark.slow
def test_every_recipe_runs_on_xformers_on_every_card_in_the_precision_it_has_kernels_for(cards):
    odd = {str(inputs) for inputs in xformers_cards.ODD}
    unsupported = {
        (one["card"], one["dtype"]) for one in cards["answers"] if one["inputs"] not in odd and one["unsupported"]
    }
    # A T4 trains in float32 (has_bfloat16), and Blackwell in bfloat16.
    assert unsupported == {("T4", "bfloat16"), ("B200", "float32"), ("RTX 5090", "float32")}
    asked = {(one["card"], one["dtype"]) for one in cards["answers"] if one["inputs"] not in odd}
    assert asked == set(itertools.product(xformers_cards.CARDS, ("float32", "bfloat16")))


@pytest.mark.slow
def test_doctor_names_what_xformers_misses(cards):
    if torch.version.cuda is None:  # the library of xformers needs a torch with CUDA
        assert cards["installed"].startswith("sdpa (not xformers: its library does not load with torch")
        assert "libcudart.so.12" in cards["installed"]
    else:
        assert cards["installed"] == "xformers"
    assert cards["explained"]["A100"] == "xformers"
    assert cards["explained"]["T4"].startswith("sdpa+xformers (not xformers in bfloat16: ")
    assert "cutlassF-pt: requires device with capability <= (9, 0)" in cards["explained"]["B200"]


@pytest.fixture
def unloadable(monkeypatch):
    """A process with CUDA whose xformers does not load."""
    monkeypatch.setattr(module, "_xformers_problem", lambda: "its library does not load")
    monkeypatch.setattr(module, "_choice", "auto")
    monkeypatch.setattr(module, "_used", set())
    module._report.cache_clear()


@pytest.fixture
def fake_cuda(monkeypatch):
    """A tensor that says it is on CUDA; the forward pass of a fake one needs no device."""
    monkeypatch.setattr("torch._subclasses.fake_tensor.init_gpu_context", lambda _device: None)
    with torch._subclasses.fake_tensor.FakeTensorMode():
        yield torch.empty(2, 4, 2, 8, device="cuda")


def test_a_broken_xformers_is_named_once_and_torch_runs(unloadable, fake_cuda, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert attention(fake_cuda, fake_cuda, fake_cuda).shape == (2, 4, 2, 8)
    lines = [record.getMessage() for record in caplog.records if record.name == module.__name__]
    assert lines == ["attention runs on torch's SDPA, not on xformers: its library does not load"]
    assert attention_used() == expected_attention() == "sdpa"


def test_xformers_by_name_is_rejected_where_its_library_does_not_load(unloadable, fake_cuda, monkeypatch):
    with pytest.raises(ValueError, match="which cannot run: its library does not load; use auto or sdpa"):
        use_attention("xformers")
    monkeypatch.setattr(module, "_choice", "xformers")
    with pytest.raises(ValueError, match="its library does not load; use auto or sdpa"):
        attention(fake_cuda, fake_cuda, fake_cuda)


def test_a_package_that_raises_at_import_is_a_reason_and_no_crash(monkeypatch, tmp_path):
    (tmp_path / "xformers").mkdir()
    (tmp_path / "xformers" / "__init__.py").write_text("raise RuntimeError('built for another torch\\nmore')")
    code = (
        "import torch; torch.cuda.is_available = lambda: True\n"
        "from animediffusion.models.network.attention import explain_attention; print(explain_attention())"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert "it cannot be imported (RuntimeError: built for another torch)" in done.stdout, done.stderr


def test_xformers_is_not_imported_on_a_cpu():
    code = (
        "import sys, torch; from animediffusion.models.network.attention import attention, explain_attention\n"
        "x = torch.zeros(1, 4, 1, 8); attention(x, x, x); explain_attention(); print('xformers' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["False"], done.stderr
