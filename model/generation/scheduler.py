"""Who takes part in the next pass: requests in order of arrival, as far as blocks and the budget of tokens go.

An older request takes the blocks it lacks from the youngest, which is preempted: it gives back its blocks and seat and
waits to be computed again. So the oldest always moves, and everybody becomes the oldest in the end. What goes wrong
with one request is told of that one (`faults`), and the others are scheduled.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from calumma.model.generation.cache.block_manager import BlockManager
from calumma.model.generation.cache.sequence import Sequence
from calumma.model.generation.request_state import RequestState

# A sequence of at most so many tokens is no prompt but an answer's end of image, and costs nothing of the budget.
FREE_TOKENS = 2


@dataclass
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
        self.waiting: deque[RequestState] = deque()  # in order of arrival, the preempted first
        self.running: list[RequestState] = []  # in order of arrival
        self.preemptions = 0
        self.faults: list[tuple[RequestState, Exception]] = []  # to be ended by who asks for the schedule
        self._seats = list(reversed(range(seats)))

    def schedule(self) -> list[ScheduledRequest]:
        """The requests of the next pass, with blocks for all they write; empty only when nobody is left."""
        scheduled: list[ScheduledRequest] = []
        budget, preemptions = self.budget, self.preemptions
        for state in list(self.running):
            budget = self._plan_alone(state, budget, scheduled)
        if self.preemptions == preemptions:
            for state in self._admit():
                budget = self._plan_alone(state, budget, scheduled)
        return scheduled

    def steps(self, scheduled: list[ScheduledRequest], most: int) -> int:
        """Passes that may be issued at once, with blocks for all: more than one only within images, when nobody else
        could move or join meanwhile."""
        if len(scheduled) < len(self.running) or not all(
            item.samples and item.state.drawing and max(item.counts) == 1 for item in scheduled
        ):
            return 1
        steps = min(most, *(item.state.codes_left for item in scheduled))
        sequences = [sequence for item in scheduled for sequence in item.state.sequences]
        while sum(self.blocks.missing(s, s.cached + steps) for s in sequences) > self.blocks.available:
            steps -= 1
        for sequence in sequences:
            self.blocks.grow(sequence, sequence.cached + steps)
        return steps

    def finish(self, state: RequestState, failed: bool = False) -> None:
        """A request is done, aborted or failed: its blocks and seat are free."""
        if state.seat >= 0:
            self._release(state, failed)
            self.running.remove(state)
        elif state in self.waiting:
            self.waiting.remove(state)

    def find(self, request_id: str) -> RequestState | None:
        every = (*self.running, *self.waiting)
        return next((state for state in every if state.request.id == request_id), None)

    def _plan_alone(self, state: RequestState, budget: int, scheduled: list[ScheduledRequest]) -> int:
        try:
            return self._plan(state, budget, scheduled)
        except Exception as error:
            self.faults.append((state, error))
            return budget

    def _plan(self, state: RequestState, budget: int, scheduled: list[ScheduledRequest]) -> int:
        """Add a request's share, unless it must stay behind, and say what is left of the budget. Takes blocks from the
        youngest others where it lacks them."""
        if state.seat < 0:  # preempted meanwhile by an older one
            return budget
        counts = []
        for sequence in state.sequences:
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
                youngest = self.running[-1]
                if youngest is state:  # older ones have the blocks; it keeps its own until they ask for them
                    return budget
                self._preempt(youngest)
        if any(counts):
            scheduled.append(ScheduledRequest(state, counts, samples, draft))
        return budget

    def _admit(self) -> list[RequestState]:
        """Start waiting requests while there are seats, and blocks for their contexts and first tokens. Nobody
        overtakes, but for one: who shares a prefix with a request that is computing it waits until it is there."""
        started: list[RequestState] = []
        behind: list[RequestState] = []
        writing = {
            self.blocks.next_block(sequence)
            for state in self.running
            for sequence in state.sequences
            if sequence.pending > FREE_TOKENS
        }
        while self.waiting and self._seats:
            state = self.waiting[0]
            # its context, one block for its first tokens, and the branches of an image begun
            blocks = sum(-(-len(sequence.tokens) // self.blocks.size) for sequence in state.sequences) + 1
            blocks = min(blocks, self.blocks.count)
            if self._shares(state):
                referenced, _, following = self.blocks.lookup(state.full.tokens)
                if following in writing:
                    behind.append(self.waiting.popleft())
                    continue
                blocks -= referenced
            if blocks > self.blocks.available:
                break
            self.waiting.popleft()
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
                continue
            state.seat = self._seats.pop()
            started.append(state)
        self.waiting.extendleft(reversed(behind))
        self.running = sorted([*self.running, *started], key=lambda state: state.arrival)
        return started

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

    def _preempt(self, state: RequestState) -> None:
        self._release(state)
        self.running.remove(state)
        self.waiting.appendleft(state)
        self.preemptions += 1

    def _release(self, state: RequestState, failed: bool = False) -> None:
        for sequence in (*state.retired, *state.sequences):
            self.blocks.release(sequence, failed)
        state.retired = []
        self._seats.append(state.seat)
        state.seat = state.seated = -1
