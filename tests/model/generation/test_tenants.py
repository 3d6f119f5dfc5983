"""How tenants share an engine: by the real scheduler over real books of blocks, with a pass that only counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from calumma.model.generation import Request, SamplingParams
from calumma.model.generation.admission import RequestLimits
from calumma.model.generation.cache.block_manager import BlockManager
from calumma.model.generation.request import Logprob
from calumma.model.generation.request_state import RequestState
from calumma.model.generation.scheduler import Scheduler
from calumma.model.generation.tenants import QUANTUM, Tenants
from calumma.model.vocabulary import Vocabulary

N = 4  # codes of an image
TEXT = 15
V = Vocabulary(
    size=28, pad=1, bos=0, eos=2, unknown=3, begin_image=4, end_image=5, end_turn=6, image_codes=list(range(7, 15))
)


@dataclass
class Job:
    """prompt, answer: tokens."""

    tenant: str
    prompt: int
    answer: int
    priority: int = 0
    mode: str = "text"


@dataclass
class Simulation:
    """An engine whose model always says the same."""

    seats: int
    blocks: int = 4096
    block: int = 4
    budget: int = 64
    quantum: int = QUANTUM
    share: bool = False
    states: list[RequestState] = field(default_factory=list)
    computed: Counter[str] = field(default_factory=Counter)  # tokens by tenant, each once
    passes: int = 0

    def __post_init__(self) -> None:
        manager = BlockManager(self.blocks, self.block, lambda *_: None, lambda *_: None, share=self.share)
        self.scheduler = Scheduler(manager, self.seats, self.budget)
        self.scheduler.tenants = Tenants(self.seats, self.blocks, self.quantum)

    def add(self, job: Job) -> RequestState:
        number = len(self.states)
        params = SamplingParams(job.answer, job.mode, guidance_text=3.0, guidance_image=1.2)  # type: ignore[arg-type]
        prompt = [V.bos, *[TEXT + number % 13] * (job.prompt - 1)]
        request = Request(str(number), prompt, params, job.tenant, job.priority)
        state = RequestState(request, RequestLimits.of(request, V, N, 100_000), number, V, N)
        self.states.append(state)
        self.scheduler.add(state)
        return state

    def step(self) -> None:
        self.passes += 1
        scheduled = self.scheduler.schedule()
        assert scheduled
        assert not self.scheduler.faults
        for item in scheduled:
            for sequence, count in zip(item.state.sequences, item.counts, strict=True):
                assert len(sequence.blocks) * self.block >= sequence.cached + count
                before = max(sequence.cached, getattr(sequence, "seen", 0))
                sequence.cached += count
                sequence.verified = sequence.cached
                self.computed[item.state.request.tenant] += max(0, sequence.cached - before)
                sequence.seen = max(before, sequence.cached)  # type: ignore[attr-defined]
            if item.samples:
                item.state.accept([V.image_codes[0] if item.state.drawing else TEXT], [Logprob(0.0)])
                if item.state.finish:
                    self.scheduler.finish(item.state)
                else:
                    self.scheduler.attach(item.state)
            for sequence in item.state.sequences:
                self.scheduler.blocks.cache_full_blocks(sequence)

    def running(self, tenant: str) -> list[RequestState]:
        return [state for state in self.scheduler.running if state.request.tenant == tenant]

    def waiting(self, tenant: str) -> list[RequestState]:
        return [state for state in self.scheduler.waiting if state.request.tenant == tenant]

    @property
    def busy(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)


jobs = st.builds(
    Job, st.sampled_from("abcd"), st.integers(1, 40), st.integers(1, 60), st.just(0), st.sampled_from(["text", "image"])
)
arriving = st.lists(st.tuples(jobs, st.integers(0, 6)), min_size=1, max_size=25)
SLOW = [HealthCheck.too_slow]


@settings(max_examples=60, deadline=None, suppress_health_check=SLOW)
@given(
    arriving=arriving,
    behind=st.sets(st.integers(0, 25)),
    seats=st.integers(1, 6),
    blocks=st.sampled_from([30, 40, 100]),
    budget=st.sampled_from([1, 7, 64]),
    quantum=st.sampled_from([1, 10, 100]),
    share=st.booleans(),
)
def test_nothing_is_lost_and_all_end(
    arriving: list[tuple[Job, int]],
    behind: set[int],
    seats: int,
    blocks: int,
    budget: int,
    quantum: int,
    share: bool,
) -> None:
    """However little there is of everything: blocks for the longest request alone, or not many more. behind: the
    requests of a lower priority."""
    engine = Simulation(seats, blocks, budget=budget, quantum=quantum, share=share)
    for number, (job, steps) in enumerate(arriving):
        engine.add(replace(job, priority=int(number in behind)))
        for _ in range(steps):
            if engine.busy:
                engine.step()
    most = 50 * sum(job.prompt + 3 * max(job.answer, N) + 10 for job, _ in arriving)
    while engine.busy:
        engine.step()
        assert engine.passes < most
    for state, (job, _) in zip(engine.states, arriving, strict=True):
        assert state.finish is not None
        assert len(state.answer) == (job.answer if job.mode == "text" else N + 2)
    manager = engine.scheduler.blocks
    assert (manager.used, sorted(engine.scheduler._seats)) == (0, list(range(seats)))
    assert all(tenant.credit <= 0 for tenant in engine.scheduler.tenants._tenants.values()), "only debtors are kept"


@settings(max_examples=60, deadline=None, suppress_health_check=SLOW)
@given(arriving=arriving, seats=st.integers(1, 6), quantum=st.sampled_from([10, 50]))
def test_no_seat_is_free_while_somebody_waits(arriving: list[tuple[Job, int]], seats: int, quantum: int) -> None:
    engine = Simulation(seats, quantum=quantum)
    for job, steps in [*arriving, (Job("a", 1, 1), 10_000)]:
        engine.add(job)
        for _ in range(steps):
            if engine.busy:
                there = len(engine.scheduler.waiting) + len(engine.scheduler.running)
                engine.step()
                left = len(engine.scheduler.waiting) + len(engine.scheduler.running)
                assert len(engine.scheduler.running) + there - left >= min(seats, there)


@settings(max_examples=80, deadline=None, suppress_health_check=SLOW)
@given(arriving=arriving, seats=st.integers(1, 3), quantum=st.sampled_from([20, 60]), budget=st.sampled_from([5, 64]))
def test_a_tenant_waits_for_one_turn_of_each_other_one(
    arriving: list[tuple[Job, int]], seats: int, quantum: int, budget: int
) -> None:
    """Between its having nothing running and its getting a seat, while it waits and owes nothing."""
    engine = Simulation(seats, quantum=quantum, budget=budget)
    since: dict[str, Counter[str]] = {}
    # late by a pass of all seats, a debt of a turn before, and a request that was taken in just now
    late = seats * (budget + 3) + 40 + 3 * (40 // 8 + 1)
    for job, steps in [*arriving, (Job("a", 1, 1), 10_000)]:
        engine.add(job)
        for _ in range(steps):
            if not engine.busy:
                break
            engine.step()
            for tenant in "abcd":
                record = engine.scheduler.tenants._tenants.get((0, tenant))
                if engine.running(tenant) or not engine.waiting(tenant) or record is None or record.credit <= 0:
                    since.pop(tenant, None)
                elif tenant not in since:
                    since[tenant] = engine.computed.copy()
                for other in set("abcd") - {tenant} if tenant in since else ():
                    assert engine.computed[other] - since[tenant][other] <= quantum + late


def test_a_tenant_with_one_request_is_served_in_the_next_pass_whatever_another_has_in_line() -> None:
    engine = Simulation(seats=4)
    for _ in range(36):
        engine.add(Job("greedy", 8, 500))
    for _ in range(20):
        engine.step()
    modest = engine.add(Job("modest", 8, 5))
    for _ in range(5):
        engine.step()
        assert len(engine.scheduler.running) >= 3
    assert modest.finish == "length", "one token a pass from the first on"
    assert [state.arrival for state in engine.running("greedy")] == [0, 1, 2], "the youngest gave its seat up"
    engine.step()
    assert [state.arrival for state in engine.running("greedy")] == [0, 1, 2, 3], "and has it back"


@pytest.mark.parametrize("other", [Job("b", 2, 400), Job("b", 2, 1, mode="image")])
def test_neither_long_answers_nor_guidance_branches_win(other: Job) -> None:
    engine = Simulation(seats=8)
    for _ in range(300):
        engine.add(Job("a", 2, 10))
        engine.add(other)
    for _ in range(100):
        engine.step()
    assert 0.75 < engine.computed["a"] / engine.computed["b"] < 1.33


def test_tenants_take_turns_at_an_only_seat() -> None:
    engine = Simulation(seats=1, quantum=50)
    for tenant in "aab":
        engine.add(Job(tenant, 2, 200))
    order = []
    while engine.busy:
        engine.step()
        order.append(engine.scheduler.running[0].request.tenant if engine.scheduler.running else "")
    turns = [len(run) for run in "".join(order[:250]).replace("ab", "a b").replace("ba", "b a").split()]
    assert all(45 <= turn <= 55 for turn in turns[:-1]), turns
    assert engine.scheduler.preemptions < 12


def test_debts_of_a_long_prompt_are_repaid() -> None:
    """One long prompt after the other gets no more than half, though none can be cut into turns."""
    engine = Simulation(seats=1, quantum=20, budget=1000)
    for _ in range(20):
        engine.add(Job("a", 400, 1))
    for _ in range(900):
        engine.add(Job("b", 1, 3))
    while engine.waiting("b"):
        engine.step()
        if engine.computed["b"] > 500:
            assert engine.computed["a"] < engine.computed["b"] + 600


def test_a_lower_priority_gets_what_others_leave() -> None:
    engine = Simulation(seats=3)
    for _ in range(6):
        engine.add(Job("spare", 2, 50, priority=1))
    for _ in range(5):
        engine.step()
    assert len(engine.running("spare")) == 3
    urgent = [engine.add(Job("a", 2, 10)), engine.add(Job("b", 2, 10))]
    for _ in range(9):
        engine.step()
        assert len(engine.running("spare")) == 1
    engine.step()
    assert [state.finish for state in urgent] == ["length"] * 2
    engine.step()
    assert len(engine.running("spare")) == 3


def test_blocks_are_shared_as_seats_are() -> None:
    """A tenant whose contexts fill the cache makes room for another's, which it would not for its own."""
    engine = Simulation(seats=16, blocks=100, block=4)
    for _ in range(4):
        engine.add(Job("a", 60, 30))
    engine.step()
    engine.step()
    assert len(engine.running("a")) > 3
    engine.add(Job("a", 60, 30))
    modest = engine.add(Job("b", 60, 5))
    engine.step()
    assert engine.running("b") == [modest]
    while engine.busy:
        engine.step()
    assert all(len(state.answer) in (5, 30) for state in engine.states)


def test_prompts_of_two_tenants_are_taken_in_side_by_side() -> None:
    engine = Simulation(seats=8, budget=64)
    for _ in range(7):
        engine.add(Job("a", 500, 1))
    engine.step()
    short = engine.add(Job("b", 60, 3))
    engine.step()
    engine.step()
    assert short.answered == 1, "in two passes, though the prompts before it need fifty"
