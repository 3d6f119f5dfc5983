"""Whose turn it is among tenants: deficit round robin by tokens (Shreedhar and Varghese 1995) over even shares.

A tenant is whoever requests are counted for, an opaque name, within a priority: tenants of a higher one go first in
everything, and the others get what these leave. Within a priority (tests/model/generation/test_tenants.py):

- Even shares: a tenant's share is the larger of its shares of sequences and of blocks (dominant resource fairness,
  Ghodsi et al. 2011). Who has the smallest is next, and takes room from who would still not have less than itself.
- Nobody starves: who has as small a share as others is next in the round. A turn in it ends with QUANTUM tokens
  computed, prompts' and answers' alike, and those of guidance branches; who is ahead of a tenant in the round takes
  room from it, if it has more. So a tenant that waits with nothing running waits for one turn of each other one at
  most; a turn ends late by a step, or where a request was given room so lately that it would be computed for nothing.
- Nothing is owed to who has nothing to do; who has used more than its turn lets turns pass until it is repaid.
- A lone tenant's requests are answered in the order of arrival.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass, field
from itertools import count

from calumma.model.generation.request_state import RequestState

QUANTUM = 256  # tokens of a turn: steps enough that taking a request in again costs little beside them
# A token of a prompt costs about so much less than one of an answer: a request that was taken in is not preempted for
# another's turn before it has drawn this part of what that took.
DRAWN_OF_TAKEN_IN = 8


@dataclass(eq=False)
class Tenant:
    """place: in the round; who has a lower one is ahead. credit: tokens left of its turn, a debt below 0. waiting,
    running: its requests, each in order of arrival."""

    name: str
    priority: int
    place: int
    credit: int
    waiting: list[RequestState] = field(default_factory=list)
    running: list[RequestState] = field(default_factory=list)

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.running


@dataclass
class _Usage:
    """Sequences and blocks that a tenant holds."""

    sequences: int
    blocks: int

    @classmethod
    def of(cls, states: list[RequestState]) -> _Usage:
        every = [sequence for state in states for sequence in state.sequences]
        return cls(len(every), sum(len(sequence.blocks) for sequence in every))

    def without(self, state: RequestState) -> _Usage:
        one = _Usage.of([state])
        return _Usage(self.sequences - one.sequences, self.blocks - one.blocks)


class Tenants:
    """seats, blocks: what there is of each. quantum: tokens of a turn."""

    def __init__(self, seats: int, blocks: int, quantum: int = QUANTUM) -> None:
        self._seats, self._blocks, self._quantum = seats, blocks, quantum
        self._tenants: dict[tuple[int, str], Tenant] = {}
        self._places = count()

    def of(self, state: RequestState) -> Tenant:
        return self._tenants[state.request.priority, state.request.tenant]

    def wait(self, state: RequestState) -> None:
        """Put a request in its tenant's line."""
        key = (state.request.priority, state.request.tenant)
        if key not in self._tenants:
            self._tenants[key] = Tenant(state.request.tenant, key[0], next(self._places), self._quantum)
        insort(self._tenants[key].waiting, state, key=lambda state: state.arrival)

    def start(self, state: RequestState) -> None:
        """One that has left the line has room."""
        insort(self.of(state).running, state, key=lambda state: state.arrival)

    def leave(self, state: RequestState, ended: bool = True) -> None:
        """Take a request out, whether it waits or runs; ended: it will not come back."""
        tenant = self.of(state)
        (tenant.running if state in tenant.running else tenant.waiting).remove(state)
        if ended:
            self.forget(state)

    def forget(self, state: RequestState) -> None:
        """A request that has been taken out will not come back."""
        self._forget(self.of(state))

    def settle(self) -> None:
        """Let turns pass, until the first in the round of each priority has credit."""
        first: dict[int, Tenant] = {}
        for tenant in sorted(self._tenants.values(), key=lambda tenant: tenant.place, reverse=True):
            first[tenant.priority] = tenant
        for priority, tenant in first.items():
            while tenant.credit <= 0:
                self._end_turn(tenant)
                self._forget(tenant)
                others = [one for one in self._tenants.values() if one.priority == priority]
                tenant = min(others, key=lambda one: one.place, default=tenant)

    def charge(self, state: RequestState, tokens: int) -> None:
        """So many tokens are computed for a request."""
        tenant = self.of(state)
        tenant.credit -= tokens
        if tenant.credit <= 0:
            self._end_turn(tenant)

    def next(self, passed_over: set[int]) -> RequestState | None:
        """Who is to be given room next; not those whose arrivals are passed over."""
        best: tuple[tuple[int, int, int], RequestState] | None = None
        for tenant in self._tenants.values():
            state = next((state for state in tenant.waiting if state.arrival not in passed_over), None)
            if state is not None:
                rank = (tenant.priority, self._share(_Usage.of(tenant.running)), tenant.place)
                if best is None or rank < best[0]:
                    best = rank, state
        return best[1] if best else None

    def givers(self, state: RequestState, seats: int, blocks: int) -> list[RequestState]:
        """Running requests of others that make room for one, of so many seats and blocks; none where they would not
        suffice. Of the lowest priority first, of the tenant with the largest share there, and of its requests the
        youngest first."""
        tenant = self.of(state)
        mine = _Usage.of(tenant.running)
        mine = _Usage(mine.sequences + len(state.sequences), mine.blocks + blocks)
        others = {one: one.running.copy() for one in self._tenants.values() if one is not tenant and one.running}
        usage = {one: _Usage.of(running) for one, running in others.items()}
        found: list[RequestState] = []
        while seats > 0 or blocks > 0:
            having = [one for one in others if others[one] and one.priority >= tenant.priority]
            giver = max(having, key=lambda one: (one.priority, self._share(usage[one]), one.place), default=None)
            if giver is None:
                return []
            youngest = others[giver].pop()
            left = usage[giver].without(youngest)
            if giver.priority == tenant.priority and not self._gives(giver, youngest, usage[giver], left, tenant, mine):
                return []
            seats -= 1
            blocks -= usage[giver].blocks - left.blocks
            usage[giver] = left
            found.append(youngest)
        return found

    def _gives(
        self, giver: Tenant, state: RequestState, before: _Usage, after: _Usage, taker: Tenant, takers: _Usage
    ) -> bool:
        """Whether a tenant gives a request's room up, which would leave it so much and the taker `takers`."""
        if self._share(after) >= self._share(takers):
            return True
        drawn = state.answered - state.answered_before
        return (
            taker.place < giver.place
            and taker.credit > 0
            and self._share(before) > self._share(_Usage.of(taker.running))
            and drawn * DRAWN_OF_TAKEN_IN >= state.taken_in
        )

    def largest(self) -> RequestState:
        """Whose blocks go first where running requests need more than there are: the youngest of the tenant with the
        largest share, of the lowest priority."""
        running = [tenant for tenant in self._tenants.values() if tenant.running]
        most = max(
            running, key=lambda one: (one.priority, self._share(_Usage.of(one.running)), one.running[-1].arrival)
        )
        return most.running[-1]

    def budgets(self, demands: dict[Tenant, int], budget: int) -> dict[Tenant, int]:
        """A pass's budget of prompt tokens by what each tenant could use: higher priorities first, then evenly; what
        one leaves is the others'."""
        given = dict.fromkeys(demands, 0)
        for priority in sorted({tenant.priority for tenant in demands}):
            hungry = sorted((one for one in demands if one.priority == priority), key=lambda one: one.place)
            while budget and (hungry := [one for one in hungry if given[one] < demands[one]]):
                each = max(1, budget // len(hungry))
                for tenant in hungry:
                    more = min(each, demands[tenant] - given[tenant], budget)
                    given[tenant] += more
                    budget -= more
        return given

    def _share(self, usage: _Usage) -> int:
        return max(usage.sequences * self._blocks, usage.blocks * self._seats)

    def _end_turn(self, tenant: Tenant) -> None:
        tenant.credit += self._quantum
        tenant.place = next(self._places)

    def _forget(self, tenant: Tenant) -> None:
        if tenant.idle and tenant.credit > 0:
            del self._tenants[tenant.priority, tenant.name]
