"""Room that tenants share: nobody's use turns everybody away."""

from __future__ import annotations

from collections import Counter
from typing import Literal


class Shares:
    """So much room in all. Who would have no more than an even part of it, among those who have any, finds room even
    where others fill it; so a few may go beyond the whole by their parts."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._held: Counter[str] = Counter()

    def full(self, tenant: str, number: int, own: int | None = None) -> Literal["tenant", "total"] | None:
        """What stands against so much more for a tenant, whose own limit is `own`; None: nothing."""
        wanted = self._held[tenant] + number
        if own is not None and wanted > own:
            return "tenant"
        active = len(self._held.keys() | {tenant})
        if self._held.total() + number > self.total and wanted > self.total // active:
            return "total"
        return None

    def take(self, tenant: str, number: int = 1) -> None:
        self._held[tenant] += number

    def give_back(self, tenant: str, number: int = 1) -> None:
        self._held[tenant] -= number
        if not self._held[tenant]:
            del self._held[tenant]
