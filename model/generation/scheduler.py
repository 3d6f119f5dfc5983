"""Who takes part in the next pass: whose turn it is (`tenants`), as far as seats, blocks and the budget of tokens go.

Invariants, beside those of `tenants`:

- Nothing is lost: a request runs or waits until it is finished. One that is preempted gives back its blocks and seat
  and waits, before the later ones of its tenant, to be computed again.
- Work is conserved: a seat is free only while nobody waits, or whoever is next waits for blocks, or for a prefix that
  another request is computing.
- Running requests that lack blocks take them from the youngest request of the tenant with most; of a lone tenant, from
  the youngest. Whoever that is stays behind; all others move. So somebody always does, and all end.
- What goes wrong with one request is told of that one (`faults`), and the others are scheduled.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass
from typing import Any

from calumma.model.generation.cache.block_manager import BlockManager
from calumma.model.generation.cache.sequence import Sequence
from calumma.model.generation.request_state import RequestState
from calumma.model.generation.tenants import Tenant, Tenants

# A sequence of at most so many tokens is no prompt but an answer's end of image, and costs nothing of the budget.
FREE_TOKENS = 2


@dataclass(slots=True)
class ScheduledRequest:
    """A request's share of a pass: the next `counts` tokens of each of its sequences.

    samples: whether all of them get to their end, so that the next token can be drawn. draft: image codes proposed
    after them, to be verified by the same pass.
    """

    state: RequestState
    counts: list[int]
    samples: bool
    draft: int = 0


class Scheduler:
    """budget: most prompt tokens a pass takes in. seats: most requests at once."""

    def __init__(self, blocks: BlockManager, seats: int, budget: int) -> None:
        self.blocks, self.budget = blocks, budget
        self.tenants = Tenants(seats, blocks.count)
        self.running: list[RequestState] = []  # in order of arrival
        self.preemptions = 0
        self.faults: list[tuple[RequestState, Exception]] = []  # to be ended by who asks for the schedule
        self._line: dict[str, RequestState] = {}  # who waits, by the request's id
        self._seats = list(reversed(range(seats)))

    @property
    def waiting(self) -> list[RequestState]:
        """In order of arrival, the preempted among them."""
        return sorted(self._line.values(), key=lambda state: state.arrival)

    def add(self, state: RequestState) -> None:
        """Put a request in line."""
        self._line[state.request.id] = state
        self.tenants.wait(state)

    def schedule(self) -> list[ScheduledRequest]:
        """The requests of the next pass, with blocks for all they write; empty only when nobody is left."""
        scheduled: list[ScheduledRequest] = []
        preemptions = self.preemptions
        self.tenants.settle()
        answering = [state for state in self.running if not _prompt_tokens(state)]
        for state in answering:
            self._plan_alone(state, 0, scheduled)
        if self.preemptions == preemptions:
            self._admit(scheduled)
        planned = {state.arrival for state in answering}
        others = [state for state in self.running if state.arrival not in planned]
        budgets = self._budgets(others)
        for state in others:
            tenant = self.tenants.of(state)
            budgets[tenant] = self._plan_alone(state, budgets[tenant], scheduled)
        for item in scheduled:
            self._charge(item)
        return scheduled

    def steps(self, scheduled: list[ScheduledRequest], most: int) -> int:
        """Passes that may be issued at once, with blocks for all: more than one only within images, when nobody else
        could move or join meanwhile."""
        if len(scheduled) < len(self.running) or not all(
            item.samples and item.state.drawing and max(item.counts) == 1 for item in scheduled
        ):
            return 1
        steps = min(most, *(item.state.codes_alike for item in scheduled))
        sequences = [sequence for item in scheduled for sequence in item.state.sequences]
        while sum(self.blocks.missing(s, s.cached + steps) for s in sequences) > self.blocks.available:
            steps -= 1
        for sequence in sequences:
            self.blocks.grow(sequence, sequence.cached + steps)
        for item in scheduled if steps > 1 else ():
            self._charge(item, steps)
        return steps

    def goes_on(self, items: list[ScheduledRequest], unread: int) -> bool:
        """Whether a pass can be issued in which these, all that run, draw one more id each, so many passes before it
        being unread: nobody else can move or join meanwhile, nobody comes to an end or to another phase by its length,
        what may be drawn depends on nothing that is unread, and there are blocks, which they get."""
        states = [item.state for item in items]
        if len(states) < len(self.running) or any(state.ids_ahead <= unread for state in states):
            return False
        if self._line:
            waiting = self.tenants.next(set())
            if self._seats or waiting is None or self.tenants.givers(waiting, 1, 0):
                return False
        sequences = [sequence for state in states for sequence in state.sequences]
        if sum(self.blocks.missing(s, s.cached + unread + 1) for s in sequences) > self.blocks.available:
            return False
        for sequence in sequences:
            self.blocks.grow(sequence, sequence.cached + unread + 1)
        if unread:  # the first has been charged with its schedule
            for item in items:
                self._charge(item, unread + 1)
        return True

    def finish(self, state: RequestState, failed: bool = False) -> None:
        """A request is done, aborted or failed: its blocks and seat are free."""
        if state.seat >= 0:
            self._release(state, failed)
            self.running.remove(state)
        elif self._line.pop(state.request.id, None) is None:
            return  # admission has taken it out already
        self.tenants.leave(state)

    def find(self, request_id: str) -> RequestState | None:
        running = (state for state in self.running if state.request.id == request_id)
        return self._line.get(request_id) or next(running, None)

    def _budgets(self, states: list[RequestState]) -> dict[Tenant, int]:
        """What of the budget the requests of each tenant get together."""
        demands: dict[Tenant, int] = {}
        for state in states:
            tenant = self.tenants.of(state)
            demands[tenant] = demands.get(tenant, 0) + _prompt_tokens(state)
        return self.tenants.budgets(demands, self.budget)

    def _charge(self, item: ScheduledRequest, steps: int = 1) -> None:
        tokens, more = 0, item.draft + steps - 1
        for sequence, count in zip(item.state.sequences, item.counts, strict=True):
            end, charged = sequence.cached + count + more, sequence.charged
            if end > charged:
                tokens += end - max(sequence.cached, charged)
                sequence.charged = end
        self.tenants.charge(item.state, tokens)

    def _plan_alone(self, state: RequestState, budget: int, scheduled: list[ScheduledRequest]) -> int:
        try:
            return self._plan(state, budget, scheduled)
        except Exception as error:
            self.faults.append((state, error))
            return budget

    def _plan(self, state: RequestState, budget: int, scheduled: list[ScheduledRequest]) -> int:
        """Add a request's share, unless it must stay behind, and say what is left of the budget. Takes blocks where it
        lacks them."""
        if state.seat < 0:  # preempted meanwhile
            return budget
        sequences = state.sequences
        if len(sequences) == 1 and state.drafts is None:  # as of most requests at most steps
            [only] = sequences
            count = len(only.tokens) - only.cached
            if 0 < count <= FREE_TOKENS and count + only.cached <= len(only.blocks) * self.blocks.size:
                scheduled.append(ScheduledRequest(state, [count], True))
                return budget
        counts = []
        for sequence in sequences:
            count = sequence.pending
            if count > FREE_TOKENS:
                count = count if count - 1 <= budget else budget
                budget -= min(count, sequence.pending - 1)
            counts.append(count)
        samples = all(count == s.pending for count, s in zip(counts, state.sequences, strict=True))
        if not samples:  # last tokens wait for each other: one pass draws from all
            counts = [min(count, s.pending - 1) for count, s in zip(counts, state.sequences, strict=True)]
        draft = len(state.drafts.codes) if samples and state.drafts is not None else 0
        for sequence, count in zip(state.sequences, counts, strict=True):
            while not self.blocks.grow(sequence, sequence.cached + count + draft):
                giver = self.tenants.largest()
                if giver is state:  # others have the blocks; it keeps its own until they ask for them
                    return budget
                self._preempt(giver, scheduled)
        if any(counts):
            scheduled.append(ScheduledRequest(state, counts, samples, draft))
        return budget

    def _admit(self, scheduled: list[ScheduledRequest]) -> None:
        """Start waiting requests while there are seats, and blocks for their contexts and first tokens, or others give
        theirs up for them. Nobody overtakes who is next, but for one: who shares a prefix with a request that is
        computing it waits until it is there."""
        if not self._line:
            return
        passed_over: set[int] = set()
        writing = {
            self.blocks.next_block(sequence)
            for state in self.running
            for sequence in state.sequences
            if sequence.pending > FREE_TOKENS
        }
        while (state := self.tenants.next(passed_over)) is not None:
            if not self._seats and not self.tenants.givers(state, 1, 0):
                return
            shared, following = self._lookup(state)
            if following is not None and following in writing:
                passed_over.add(state.arrival)
                continue
            if not self._make_room(state, shared, scheduled):
                return
            del self._line[state.request.id]
            self.tenants.leave(state, ended=False)
            try:
                for sequence in state.sequences:
                    self._attach(state, sequence)
                    if not self.blocks.grow(sequence, len(sequence.tokens)):
                        raise AssertionError("admission counted too few blocks")
                    if sequence.pending > FREE_TOKENS:
                        writing.add(self.blocks.next_block(sequence))
            except Exception as error:
                for sequence in state.sequences:
                    self.blocks.release(sequence, failed=True)
                self.faults.append((state, error))
                self.tenants.forget(state)
                continue
            state.seat = self._seats.pop()
            state.taken_in = sum(sequence.pending for sequence in state.sequences)
            state.answered_before = state.answered
            self.tenants.start(state)
            insort(self.running, state, key=lambda state: state.arrival)

    def _make_room(self, state: RequestState, shared: int, scheduled: list[ScheduledRequest]) -> bool:
        """A seat and blocks for a request that shares so many; what it lacks others give, who may be among the
        scheduled then. Its blocks are those of its context, one for its first tokens, and the branches of an image
        begun."""
        blocks = sum(-(-len(sequence.tokens) // self.blocks.size) for sequence in state.sequences) + 1
        blocks = min(blocks, self.blocks.count)
        lacking = max(0, 1 - len(self._seats)), max(0, blocks - shared - self.blocks.available)
        if any(lacking):
            for giver in self.tenants.givers(state, *lacking):
                self._preempt(giver, scheduled)
            shared, _ = self._lookup(state)  # they may have been a giver's
        return bool(self._seats) and blocks - shared <= self.blocks.available

    def _lookup(self, state: RequestState) -> tuple[int, Any]:
        """Blocks of running requests that it would share, and the first block that it would lack."""
        if not self._shares(state):
            return 0, None
        referenced, _, following = self.blocks.lookup(state.full)
        return referenced, following

    def _shares(self, state: RequestState) -> bool:
        """A prompt whose every logit is asked for must be computed; what it writes is as good for others."""
        return self.blocks.share and state.params.prompt_logprobs is None

    def attach(self, state: RequestState) -> None:
        """Look a running request's new branches up in what the cache holds; release those of no further use."""
        for sequence in state.retired:
            self.blocks.release(sequence)
        state.retired = []
        for sequence in state.sequences:
            if not sequence.attached:
                self._attach(state, sequence)

    def _attach(self, state: RequestState, sequence: Sequence) -> None:
        if self._shares(state) or sequence is not state.full:
            self.blocks.attach(sequence)
        sequence.attached = True

    def _preempt(self, state: RequestState, scheduled: list[ScheduledRequest]) -> None:
        self._release(state)
        self.running.remove(state)
        scheduled[:] = [item for item in scheduled if item.state is not state]
        self.tenants.leave(state, ended=False)
        self.add(state)
        self.preemptions += 1

    def _release(self, state: RequestState, failed: bool = False) -> None:
        for sequence in (*state.retired, *state.sequences):
            self.blocks.release(sequence, failed)
        state.retired = []
        self._seats.append(state.seat)
        state.seat = state.seated = -1


def _prompt_tokens(state: RequestState) -> int:
    """Tokens of a request that count for a pass's budget."""
    tokens = 0
    for sequence in state.sequences:
        pending = len(sequence.tokens) - sequence.cached
        if pending > FREE_TOKENS:
            tokens += pending - 1
    return tokens
