"""The list of mutations; `make mutation` runs them."""

from tests.mutations.run import ROOT, load


def test_every_mutation_fits_the_code() -> None:
    mutations = load()
    assert len({one.name for one in mutations}) == len(mutations) >= 69
    for one in mutations:
        assert one.old != one.new, one.name
        assert all((ROOT / test.partition("::")[0]).is_file() for test in one.tests), one.name
