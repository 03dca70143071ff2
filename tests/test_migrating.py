"""The other program and ours train the same weights, for each pair in docs/migrating.md whose library is here."""

import pytest

from migrations import ORDERED_OTHERWISE, PAIRS, compare, installed
from orchestrator import attempt


@pytest.mark.parametrize("section", PAIRS)
@pytest.mark.filterwarnings("ignore")  # the others'
def test_ours_trains_what_theirs_does(section: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not installed(section):
        pytest.skip(f"without {' and '.join(PAIRS[section])}; `make bench-exact` has them, and runs this")
    monkeypatch.setattr(attempt, "start_shipper", lambda run, tracker: None)
    found = compare(section)
    if section in ORDERED_OTHERWISE:
        assert found.difference < 1e-6
    else:
        assert found.same, found.difference
