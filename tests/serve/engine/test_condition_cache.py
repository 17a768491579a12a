import pytest
import torch

from animediffusion.models.bundle import Bundle
from animediffusion.serve.engine.condition_cache import ConditionCache, pair_of

SIZE = 32


def picture(channels, seed):
    return torch.rand(channels, SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def pair(sketch, reference):
    return pair_of(picture(1, sketch), [picture(3, 100 + reference)])


@pytest.fixture
def encoded(bundle: Bundle, monkeypatch):
    """How many references and pairs each call of the network encoded."""
    calls = {"encode_reference": [], "combine": []}
    for name, rows in calls.items():
        work = getattr(bundle.denoiser, name)
        monkeypatch.setattr(bundle.denoiser, name, lambda *a, w=work, r=rows: r.append(len(a[0])) or w(*a))
    return calls


def assert_rows_are(condition, expected):
    for part, other in zip(condition, expected, strict=True):
        torch.testing.assert_close(part, other, atol=1e-5, rtol=1e-4)


def test_a_condition_is_that_of_the_pair_alone(bundle: Bundle):
    pairs = [pair(0, 0), pair(1, 0), pair(0, 1).without_reference(), pair(0, 1)]
    found = ConditionCache(bundle.denoiser, 8).get(pairs)
    for one, condition in zip(pairs, found, strict=True):
        keep = torch.tensor([one.reference_digests != (b"",)])
        assert_rows_are(condition, bundle.denoiser.encode(one.sketch[None], one.references[0][None], keep))


def test_a_reference_is_encoded_once_for_all_sketches_and_a_pair_once(bundle: Bundle, encoded):
    cache = ConditionCache(bundle.denoiser, 8)
    cache.get([pair(0, 0), pair(1, 0), pair(0, 0)])
    cache.get([pair(2, 0), pair(0, 0), pair(3, 1)])
    cache.get([pair(2, 0), pair(3, 1)])
    assert encoded == {"encode_reference": [1, 1], "combine": [2, 2]}
    assert (cache.hits, cache.misses) == (6, 2)


def test_the_null_reference_is_encoded_once_per_model(bundle: Bundle, encoded):
    cache = ConditionCache(bundle.denoiser, 8)
    for number in range(3):
        cache.get([pair(number, number).without_reference()])
    assert encoded == {"encode_reference": [1], "combine": [1, 1, 1]}
    assert (cache.hits, cache.misses) == (0, 0)


def test_the_least_recently_used_is_dropped(bundle: Bundle, encoded):
    cache = ConditionCache(bundle.denoiser, 2)
    for number in (0, 1, 0, 2, 0, 1):
        cache.get([pair(number, number)])
    assert encoded["combine"] == [1, 1, 1, 1]  # the last one was dropped for the third


def test_more_conditions_in_one_call_than_the_cache_keeps_are_not_an_error(bundle: Bundle):
    assert len(ConditionCache(bundle.denoiser, 1).get([pair(0, 0), pair(1, 1), pair(0, 0)])) == 3


def test_each_of_several_references_is_encoded_once_and_pairs_with_equally_many_together(bundle: Bundle, encoded):
    cache = ConditionCache(bundle.denoiser, 8)
    one, two, both = (pair_of(picture(1, 0), [picture(3, seed) for seed in seeds]) for seeds in ((1,), (2,), (1, 2)))
    found = cache.get([one, two, both])
    assert encoded == {"encode_reference": [2], "combine": [2, 1]}
    for pair, condition in zip((one, two, both), found, strict=True):
        references = [reference[None] for reference in pair.references]
        assert_rows_are(condition, bundle.denoiser.encode(pair.sketch[None], references))
    assert found[2].tokens.shape[1] == 2 * found[0].tokens.shape[1]
    null = cache.get([both.without_reference()])[0]
    assert_rows_are(null, bundle.denoiser.encode(picture(1, 0)[None], [picture(3, 1)[None]] * 2, torch.tensor([False])))


def test_hints_are_part_of_the_sketch(bundle: Bundle, encoded):
    cache = ConditionCache(bundle.denoiser, 8)
    hints = torch.ones(4, SIZE, SIZE)
    pairs = [pair_of(picture(1, 0), [picture(3, 1)], given) for given in (None, hints, 2 * hints, hints)]
    cache.get(pairs)
    assert encoded == {"encode_reference": [1], "combine": [3]}
