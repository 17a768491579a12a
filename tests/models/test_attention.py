import pytest
import torch

from animediffusion.models.attention import PLAIN_LIMIT, attention, attention_used, expected_attention, use_attention


@pytest.mark.parametrize(("queries", "keys"), [(5, 7), (500, PLAIN_LIMIT // 400)])
def test_attention_is_the_plain_softmax_formula(queries, keys):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, queries, 3, 8, generator=generator, dtype=torch.float64)
    key, value = (torch.randn(2, keys, 3, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = torch.einsum("bmhk,bnhk->bhmn", query, key).div(8**0.5).softmax(-1)
    plain = torch.einsum("bhmn,bnhk->bmhk", weights, value)
    torch.testing.assert_close(attention(query, key, value), plain)
    assert "sdpa" in attention_used()


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="auto, xformers or sdpa, got 'flash'"):
        use_attention("flash")


def test_without_cuda_torch_is_expected_and_xformers_refused():
    assert expected_attention() == "sdpa"
    with pytest.raises(ValueError, match="needs CUDA"):
        use_attention("xformers")
