"""A few seconds of ``make soak``."""

from tests.soak import FAULTS, Episode, Tally, soak


def test_episodes_of_faults_break_no_invariant() -> None:
    tally = Tally()
    for seed in range(6):
        Episode(seed, tally).run()
    assert tally.violations == []
    assert tally.steps == 900
    assert set(tally.faults) == set(FAULTS)
    assert 0 < tally.accepted < tally.attempted


def test_a_seed_says_everything() -> None:
    tallies = [Tally(), Tally()]
    for tally in tallies:
        Episode(7, tally).run()
    assert tallies[0] == tallies[1]


def test_memory_that_grows_is_a_violation() -> None:
    flat, growing = Tally(objects=[100_000] * 12), Tally(objects=list(range(0, 120_000, 10_000)))
    flat.check_memory()
    growing.check_memory()
    assert flat.violations == []
    assert growing.violations == ["objects: grows, 40000 after warm-up, 110000 at the end"]


def test_the_clock_ends_a_soak() -> None:
    tally = soak(seconds=0.01, seed=0)
    assert tally.episodes == len(tally.resident) == 1
    assert "violations      0" in tally.report()
