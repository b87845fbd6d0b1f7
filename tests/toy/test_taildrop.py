"""The toy method keeps the first tokens."""

import pytest

from compress import TailDrop


@pytest.mark.parametrize("keep, share", [(1.0, 1.0), (0.5, 0.5)])
def test_the_share_is_what_was_asked_for(keep, share):
    facts = [{"total": 10, "kept": 10 * keep}, {"total": 30, "kept": 30 * keep}]
    assert TailDrop(keep=keep).count(facts) == {"tail_kept": share}
