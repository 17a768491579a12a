import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import fisher_exact

from animediffusion.pipelines.release.correction_rate import decide, probability_of_at_most
from animediffusion.platform.corrections.counts import VersionCounts

PAIRS = st.integers(0, 300).flatmap(lambda answered: st.tuples(st.just(answered), st.integers(0, answered)))


@given(PAIRS, PAIRS)
def test_the_test_is_fishers(few: tuple[int, int], others: tuple[int, int]) -> None:
    table = [[corrected, answered - corrected] for answered, corrected in (few, others)]
    expected = fisher_exact(table, alternative="less").pvalue
    assert probability_of_at_most(VersionCounts(*few), VersionCounts(*others)) == pytest.approx(
        expected, rel=1e-6, abs=1e-12
    )


@pytest.mark.parametrize(
    ("champion", "challenger", "decision"),
    [
        ((900, 300), (100, 10), "promote"),
        ((900, 300), (100, 28), "wait"),
        ((900, 300), (99, 0), "wait"),
        ((99, 99), (900, 0), "wait"),
        ((900, 100), (100, 30), "end canary"),
        ((9000, 1000), (999, 100), "wait"),
        ((9000, 1000), (1000, 100), "end canary"),
        ((0, 0), (0, 0), "wait"),
        ((900, 0), (100, 0), "wait"),
        ((900, 300), (100, 101), "end canary"),
    ],
)
def test_a_canary_is_decided_by_enough_answers(champion, challenger, decision) -> None:
    found, why = decide(VersionCounts(*champion), VersionCounts(*challenger), 100)
    assert found == decision
    assert f"of {challenger[0]}) of the challenger's answers corrected" in why
