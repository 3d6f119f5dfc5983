"""How many replicas there are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from calumma.serve.deploy.scaling import QueuedTokensPolicy


@pytest.mark.parametrize(
    ("requests", "queued", "wanted"),
    [(0, {}, 0), (10, {}, 2), (1, {"a": 3000.0, "b": 1000.0}, 4), (10, {"a": 500.0}, 2)],
)
def test_replicas_follow_requests_and_the_prompts_in_line(
    requests: float, queued: dict[str, float], wanted: float
) -> None:
    context: Any = SimpleNamespace(total_num_requests=requests, aggregated_metrics={"queued_tokens": queued})
    assert QueuedTokensPolicy(requests_per_replica=5, tokens_per_replica=1000)(context) == (wanted, {})
    without: Any = SimpleNamespace(total_num_requests=requests, aggregated_metrics=None)
    assert QueuedTokensPolicy(5, 1000)(without) == (requests / 5, {})
