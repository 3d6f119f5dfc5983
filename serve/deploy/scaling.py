"""How many replicas there are. Ray Serve's controller imports this, so it imports nothing heavy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext


def replicas_wanted(requests: float, queued_tokens: float, per_replica: float, tokens_per_replica: float) -> float:
    """Enough for the ongoing requests, and for the queued prompt tokens: long prompts fill a replica before their
    number does."""
    return max(requests / per_replica, queued_tokens / tokens_per_replica)


class QueuedTokensPolicy:
    """The autoscaling policy, called by Ray Serve's controller: ongoing requests, and prompt tokens in line. Ray Serve
    applies the delays and the bounds of the configuration."""

    def __init__(self, requests_per_replica: float, tokens_per_replica: float) -> None:
        self._requests, self._tokens = requests_per_replica, tokens_per_replica

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        queued = (context.aggregated_metrics or {}).get("queued_tokens", {})
        wanted = replicas_wanted(
            context.total_num_requests,
            sum(value for value in queued.values() if value is not None and math.isfinite(value)),
            self._requests,
            self._tokens,
        )
        return wanted, {}
