"""The generation engine: add requests, step, read events. Requests join and leave at any step.

All running requests, in whatever phase, share every forward pass, prompts that are taken in included. Unlike the public
release, which batches one modality at a time and computes the whole prompt anew at each change of phase (paper,
"Generation").
"""

from __future__ import annotations

import logging
import secrets
from collections import deque
from collections.abc import Mapping
from dataclasses import replace

import torch

from calumma.model.generation.admission import RequestLimits, check_sizes
from calumma.model.generation.cache.below import host_blocks
from calumma.model.generation.cache.block_manager import BLOCK_SIZE, BlockManager
from calumma.model.generation.cache.device_memory import MemoryBudget
from calumma.model.generation.cache.disk_blocks import DiskCache
from calumma.model.generation.cache.sizing import Workload
from calumma.model.generation.constraint import ConstraintCompiler, GrammarTooLarge, TokenConstraint
from calumma.model.generation.faults import FaultContainment, described
from calumma.model.generation.passes.ahead import AheadPasses
from calumma.model.generation.passes.decoder import Decoder
from calumma.model.generation.passes.output import RunnerOutput
from calumma.model.generation.passes.profiling import positions_that_fit
from calumma.model.generation.passes.runner import ModelRunner
from calumma.model.generation.request import Event, Failure, Request
from calumma.model.generation.request_state import RequestState
from calumma.model.generation.sampling.randomness import FILLED
from calumma.model.generation.scheduler import ScheduledRequest, Scheduler
from calumma.model.generation.statistics import Counters, Statistics, snapshot
from calumma.model.generation.tensor_parallel import Shard
from calumma.model.ops.adapter import Adapter
from calumma.model.ops.fused import Kernels
from calumma.model.transformer import Transformer
from calumma.model.vocabulary import Vocabulary

log = logging.getLogger(__name__)

IN_GROUPS = 8  # codes that a group drafts where it is left to it: its processes must agree
Command = tuple[str, tuple[Request, RequestLimits] | None]  # a request by its id; None is an abort


class Engine:
    """Continuous batching over a paged cache of keys and values.

    image_length: codes of an image. max_sequences: most requests that are answered at once; the guidance branches of
    their images come beside. context: most tokens of prompt and answer, the model's by default.
    cache_tokens: positions the cache holds, `max_sequences` whole contexts by default; requests that outgrow it
    together take turns. memory: how much of the device the engine may fill; then the cache, unless it is given, is what
    that leaves room for after the largest pass, and MemoryShort is raised where it is less than a context.
    block_size: positions of a block of it. prefix_cache: keep what is computed for requests, and branches, that begin
    alike.
    prefill_tokens: most prompt tokens a step takes in, so that a long prompt does not hold up those who are answering.
    image_burst: most codes a step draws at once when all requests are within images and none is waiting to be taken in,
    at most 64.
    jacobi_window: image codes that speculative Jacobi decoding drafts ahead and verifies in one pass, fewer the more
    images are drawn at once; 0 draws one code a pass. Codes come from the same distribution, but a seed gives others
    than with 0; any two other windows give the same. None drafts as many as pay, none among them, by what passes are
    measured to cost as the engine starts and by how far drafts have stood; on a GPU it is 0, in a group 8.
    cuda_graphs: run passes of one token a sequence in fixed shapes, recorded as CUDA graphs; None does so where a
    GPU has all of the model. All are recorded as the engine is made. On a CPU, or in a group without NCCL, they run
    unrecorded.
    ahead: issue the next pass before this one's ids are read, while all requests only go on; None does so on a GPU,
    which would wait for the host. Events come a step later, and are the same.
    constraints: compiles the grammars that requests ask for (`calumma.model.tokenizers.grammar.GrammarCompiler`), in
    every process of a group alike; without it they are refused.
    shard: this process's shard in a group that shares the model (tensor parallelism): all make the same engine; the
    first is used as ever and closed in the end, the others `follow` it. The transformer is whole, or what `read_shard`
    gives.
    adapters: by name, those that requests may be answered with, all of them in the same passes; not in a group.
    kernels: of the CPU: `native` takes our own throughout, with which the bits of an answer's log-probabilities do not
    depend on its company where prompts are taken in whole; `auto` whichever are measured to be faster as it starts.
    host_cache: bytes of the host's memory for blocks that the cache gives up, where requests find them again.
    disk_cache: a folder for those that are given up there in turn, and for all of them when the engine is closed:
    engines of the same weights find them; not in a group.
    decoder: in place of the transformer's own, whose configuration is all that is read then (passes/streamed.py).
    The transformer is put into evaluation mode. `add`, `abort` and what tells the state may be called from other
    threads while one thread calls `step`.
    """

    def __init__(
        self,
        transformer: Transformer,
        vocabulary: Vocabulary,
        image_length: int,
        max_sequences: int = 16,
        context: int | None = None,
        *,
        prefill_tokens: int = 2048,
        image_burst: int = 8,
        cache_tokens: int | None = None,
        block_size: int = BLOCK_SIZE,
        prefix_cache: bool = True,
        jacobi_window: int | None = 0,
        cuda_graphs: bool | None = None,
        ahead: bool | None = None,
        constraints: ConstraintCompiler | None = None,
        shard: Shard | None = None,
        memory: MemoryBudget | None = None,
        adapters: Mapping[str, Adapter] | None = None,
        host_cache: int = 0,
        disk_cache: DiskCache | None = None,
        decoder: Decoder | None = None,
        kernels: Kernels = "auto",
    ) -> None:
        self.context = transformer.config.context if context is None else context
        check_sizes(
            transformer.config,
            vocabulary,
            context=self.context,
            image_length=image_length,
            max_sequences=max_sequences,
            prefill_tokens=prefill_tokens,
            image_burst=image_burst,
            block_size=block_size,
            cache_tokens=block_size if cache_tokens is None else cache_tokens,
        )
        self.vocabulary, self.image_length, self.max_sequences = vocabulary, image_length, max_sequences
        if jacobi_window is not None and jacobi_window < 0:
            raise ValueError(f"jacobi_window {jacobi_window} must be 1 or more, or 0 for none")
        if jacobi_window is None and transformer.embedding.weight.is_cuda:
            jacobi_window = 0
        if jacobi_window is None and shard is not None:
            jacobi_window = IN_GROUPS
        self.image_burst = min(image_burst, FILLED) if jacobi_window == 0 else 1
        graphs = transformer.embedding.weight.is_cuda and shard is None if cuda_graphs is None else cuda_graphs
        if disk_cache is not None and shard is not None:
            raise ValueError("blocks are kept on a disk of a model that one process has, not of one that is sharded")
        if adapters and shard is not None:
            raise ValueError("adapters are served beside a model that one process has, not one that is sharded")
        decoder = decoder or Decoder(transformer.eval(), shard, adapters, kernels)
        self._adapters = {name: number for number, name in enumerate(adapters or (), start=1)}
        if cache_tokens is None and memory is not None:
            cache_tokens = positions_that_fit(
                decoder, memory, Workload(max_sequences, prefill_tokens, graphs), block_size
            )
        count = max_sequences * -(-self.context // block_size) if cache_tokens is None else cache_tokens // block_size
        self._runner = ModelRunner(
            decoder, vocabulary, image_length, count, block_size, max_sequences, self.context, jacobi_window, graphs
        )
        cache = self._runner.cache
        self._host_blocks = host_blocks(cache, transformer, adapters, host_cache, disk_cache)
        self._blocks = BlockManager(
            count, block_size, cache.copy, cache.clear, share=prefix_cache, below=self._host_blocks
        )
        self._scheduler = Scheduler(self._blocks, max_sequences, prefill_tokens)
        self._containment = FaultContainment(self._runner)
        self._constraints = constraints
        self._shard = self._runner.decoder.shard
        self.ahead = self._runner.device.type == "cuda" if ahead is None else ahead
        self._ahead: AheadPasses | None = None  # one of which is not read, between steps
        self._counters = Counters()
        self._known: set[str] = set()
        self._arrivals = 0
        self._inbox: deque[Command] = deque()  # of other threads, until the next step

    def add(self, request: Request) -> None:
        """Put a request in line. Nothing else is disturbed when it is refused: PromptTooLong, or ValueError on a prompt
        that is no prompt, on an id in use, on a grammar that is none or that the prefix contradicts, and on a request
        that could outgrow the cache alone."""
        if request.id in self._known:
            raise ValueError(f"a request with the id {request.id!r} is being answered")
        if request.adapter and request.adapter not in self._adapters:
            raise ValueError(
                f"there is no adapter {request.adapter!r}; there are: {', '.join(self._adapters) or 'none'}"
            )
        limits = RequestLimits.of(request, self.vocabulary, self.image_length, self.context)
        blocks = limits.blocks(self._blocks.size)
        if blocks > self._blocks.count:
            size = self._blocks.size
            guided = " with the branches of image guidance" if len(limits.lengths) > 1 else ""
            raise ValueError(
                f"the request may need {blocks * size} positions of the cache{guided}; it has "
                f"{self._blocks.count * size}. Fewer max_tokens, a shorter prompt or more cache_tokens would do"
            )
        if request.params.random:
            request = replace(request, params=replace(request.params, seed=secrets.randbits(64)))
        if request.params.constraint is not None:
            self._state(request, limits)  # which raises
        self._known.add(request.id)
        self._inbox.append((request.id, (request, limits)))

    def abort(self, request_id: str) -> None:
        """End a request; the next step frees its blocks and reports it "aborted". Nothing happens if it has ended."""
        if request_id in self._known:
            self._inbox.append((request_id, None))

    @property
    def device(self) -> torch.device:
        return self._runner.device

    @property
    def has_work(self) -> bool:
        """Whether there is anything a step would do."""
        return bool(self._known)

    @property
    def running(self) -> int:
        """Requests being answered."""
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        """Requests in line, those included that gave their room back to others."""
        return len(self._known) - self.running

    @property
    def statistics(self) -> Statistics:
        """What is going on and what has been done."""
        added = [command[1][0] for command in list(self._inbox) if command[1] is not None]
        return snapshot(self._counters, self._runner, self._blocks, self._host_blocks, self._scheduler, added)

    def step(self) -> list[Event]:
        """Carry out additions and aborts, then one forward pass: the next chunk of prompts, and the next token (or
        several image codes) of every request that is ready. Events of each request that moved or ended; an empty list
        while only prompts are taken in. What goes wrong ends the requests it is about, "failed". Raises StepFailed
        where it is the engine that is broken; it is of no use then."""
        return self._step(self._shard.broadcast_object([self._inbox.popleft() for _ in range(len(self._inbox))]))

    def follow(self) -> None:
        """In the group's other processes: do as the first does, until it closes its engine."""
        while (commands := self._shard.broadcast_object(None)) is not None:
            self._step(commands)

    def close(self) -> None:
        """Let the group's other processes go; write what the cache holds to the disk, where one is given."""
        if self._host_blocks is not None:
            self._host_blocks.close(self._blocks.held())
        if self._shard.index == 0:
            self._shard.broadcast_object(None)

    @torch.inference_mode()
    def _step(self, commands: list[Command]) -> list[Event]:
        events: list[Event] = []
        if self._ahead is not None:
            events += self._go_on(self._ahead, again=not commands)
            if self._ahead is not None:
                return events
        events += self._apply(commands)
        scheduled = self._scheduler.schedule()
        for item in scheduled:
            try:
                self._seat(item.state)
            except Exception as error:
                self._scheduler.faults.append((item.state, error))
        while self._scheduler.faults:
            state, fault = self._scheduler.faults.pop()
            scheduled = [item for item in scheduled if item.state is not state]
            events += self._fail(state, Failure("error", described(fault)))
        if not scheduled:
            return events
        if self.ahead and (ahead := self._start_ahead(scheduled)) is not None:
            return events + self._go_on(ahead, again=True)
        outputs = self._containment.run(scheduled, self._scheduler.steps(scheduled, self.image_burst))
        self._counters.steps += 1
        for output in outputs:
            events += self._accept(output)
        self._cache_full_blocks(scheduled)
        return events

    def _start_ahead(self, scheduled: list[ScheduledRequest]) -> AheadPasses | None:
        """The first of passes that are issued ahead, where these requests allow that and not even more at once."""
        if not all(item.samples and not item.draft and max(item.counts) == 1 for item in scheduled):
            return None
        bursts = self.image_burst > 1 and all(item.state.drawing for item in scheduled)
        if bursts or (self._runner.window and any(item.state.drawing for item in scheduled)):
            return None
        if not self._scheduler.goes_on(scheduled, 0):
            return None
        ahead = AheadPasses(self._runner, scheduled)
        if not self._containment.issue(ahead):
            return None
        self._counters.steps += 1
        self._ahead = ahead
        return ahead

    def _go_on(self, ahead: AheadPasses, again: bool) -> list[Event]:
        """Issue the next pass, where there is one, and read the one before."""
        again = again and ahead.steady and self._scheduler.goes_on(ahead.items, ahead.unread)
        again = again and self._containment.issue(ahead)
        self._counters.steps += again
        outputs = self._containment.read(ahead)
        self._ahead = ahead if again and outputs is not None else None
        events: list[Event] = []
        for output in outputs or ():
            slots = ahead.slots(output.state)
            events += self._accept(output)
            if slots:
                self._cut_back(output.state, slots, began=output.tokens[-1:] == [self.vocabulary.begin_image])
        self._cache_full_blocks(ahead.items)
        return events

    def _cut_back(self, state: RequestState, slots: list[int], began: bool) -> None:
        """Undo what a pass that is not read has done for a request that has come to an end, or began an image."""
        if state.finish:  # what is written there may not be numbers, and others get the blocks
            self._runner.cache.clear_positions(slots)
        elif began:
            self._runner.sampler.adjustments.forget(state.seat, len(state.penalized_prompt) + state.answered)

    def _cache_full_blocks(self, scheduled: list[ScheduledRequest]) -> None:
        for item in scheduled:
            for sequence in item.state.sequences:
                if sequence.verified >= (len(sequence.chain) + 1) * self._blocks.size:
                    self._blocks.cache_full_blocks(sequence)

    def _seat(self, state: RequestState) -> None:
        if state.seated != state.seat:
            seen = state.penalized_ids if state.params.text.penalized else []
            self._runner.sampler.seat(state.seat, state.params, state.seed, seen, state.answered)
            state.seated = state.seat

    def _accept(self, output: RunnerOutput) -> list[Event]:
        state = output.state
        if state.finish:  # another pass has told of its failure
            return []
        if output.failure is not None:
            return self._fail(state, output.failure, output)
        try:
            events = state.accept(output.tokens, output.logprobs)
            if not state.finish:
                self._scheduler.attach(state)
        except GrammarTooLarge as error:
            return self._fail(state, Failure("no token", str(error)))
        except Exception as error:
            return self._fail(state, Failure("error", described(error)))
        self._count(events)
        if state.finish:
            self._scheduler.finish(state)
            self._known.discard(state.request.id)
            self._counters.finished += 1
        return events

    def _fail(self, state: RequestState, failure: Failure, output: RunnerOutput | None = None) -> list[Event]:
        """End a request that something went wrong with. What was drawn for it before stands."""
        try:
            events = state.fail(failure, output.tokens if output else (), output.logprobs if output else ())
        except Exception:  # even that: it is ended all the same
            log.exception("request %s failed, and could not say what it had", state.request.id)
            events = [Event(state.request.id, [], state.phase, "failed", failure=failure)]
        self._scheduler.finish(state, failed=True)
        self._known.discard(state.request.id)
        self._counters.failed += 1
        self._count(events)
        return events

    def _count(self, events: list[Event]) -> None:
        for event in events:
            if event.phase == "image":
                self._counters.image_tokens += len(event.tokens)
                self._counters.images += event.tokens.count(self.vocabulary.end_image)
            else:
                self._counters.text_tokens += len(event.tokens)

    def _state(self, request: Request, limits: RequestLimits) -> RequestState:
        """Raises ValueError on a grammar that is none, and on a prefix that it does not allow."""
        constraint: TokenConstraint | None = None
        if request.params.constraint is not None:
            if self._constraints is None:
                raise ValueError("this engine compiles no grammars")
            constraint = self._constraints(request.params.constraint)
        adapter = self._adapters.get(request.adapter, 0)
        return RequestState(request, limits, self._arrivals, self.vocabulary, self.image_length, constraint, adapter)

    def _apply(self, commands: list[Command]) -> list[Event]:
        events = []
        for request_id, added in commands:
            if added is not None:
                request, limits = added
                self._known.add(request_id)
                self._arrivals += 1
                self._counters.prompt_tokens += len(request.tokens)
                try:
                    self._scheduler.add(self._state(request, limits))
                except Exception as error:
                    self._known.discard(request_id)
                    self._counters.failed += 1
                    failure = Failure("error", described(error))
                    events.append(Event(request_id, [], "text", "failed", failure=failure))
            elif request_id in self._known:
                state = self._scheduler.find(request_id)
                assert state is not None, "what is known runs or waits"
                self._scheduler.finish(state)
                self._known.discard(request_id)
                self._counters.aborted += 1
                events.append(Event(request_id, [], state.phase, "aborted"))
        return events
