"""A part of what `python -m tests.clients.lm_eval_rows` does in full."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.clients.heavy import heavy

pytestmark = [pytest.mark.weights, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def test_accuracy_is_that_of_scoring_in_process(default_gguf: Path, shared_data: Path) -> None:
    heavy("lm_eval")
    from tests.clients.lm_eval_rows import CLOSE, compare

    for name, found in compare(default_gguf, shared_data, 20).items():
        assert found.accuracy(found.theirs) == found.accuracy(found.ours), name
        assert max(map(found.apart, range(20))) < CLOSE, name
