"""Continuous batching: requests join, pause and leave the batch at every step of the model.

Policy: running requests go first, oldest first; a request that finds no block preempts the
youngest running one, which gives all its blocks back and waits to be recomputed; waiting requests
are admitted in order while they fit the pool and the step's token budget.
Sources: Orca (Yu et al. 2022, iteration-level scheduling); Kwon et al. 2023, section 4.5.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from torch import Tensor

from llmopt_lab.core.errors import OutOfBlocks, require
from llmopt_lab.core.memory import ceil_div
from llmopt_lab.core.trace import record
from llmopt_lab.paged_attention.prefix import admit, find_prefix, publish
from llmopt_lab.paged_attention.records import (
    Admitted,
    CacheConfig,
    Finished,
    Preempted,
    Stepped,
)
from llmopt_lab.paged_attention.reference import PagedCache


@dataclass
class Request:
    """A prompt to continue by `n_new` tokens, or until a token of `eos`.

    `n_samples` > 1 asks for several continuations; they share the prompt's blocks. `temperature`
    0 is greedy; `seed` decides the draws, sample i draws from a generator seeded `seed + i`.
    """

    name: str
    prompt: list[int]
    n_new: int
    n_samples: int = 1
    temperature: float = 0.0
    seed: int = 0
    eos: frozenset[int] = frozenset()
    generated: list[int] = field(default_factory=list)
    was_preempted: bool = False

    @property
    def tokens(self) -> list[int]:
        """What is known so far. The newest token's keys and values are not in the cache yet."""
        return self.prompt + self.generated

    @property
    def is_done(self) -> bool:
        return len(self.generated) >= self.n_new or self.generated[-1:] in ([e] for e in self.eos)


@dataclass(frozen=True)
class Work:
    """What one request does in this step: compute its last len(slots) tokens into `slots`."""

    request: Request
    slots: Tensor                   # (n_tokens,) int64

    @property
    def tokens(self) -> list[int]:
        return self.request.tokens[-len(self.slots) :]


class Scheduler:
    """Decides who runs in the next step. It moves block numbers, never keys or values.

    Every submitted request is in exactly one of three places: `waiting`, `running`, or done and
    gone. Only running requests hold blocks.
    """

    def __init__(
        self,
        cache: PagedCache,
        *,
        max_running: int = 256,         # vLLM: max_num_seqs
        max_step_tokens: int = 2048,    # vLLM: max_num_batched_tokens; one longer prompt may pass
        salt: str = "",
    ):
        require(max_running > 0, f"max_running must be positive; got {max_running}")
        require(max_step_tokens > 0, f"max_step_tokens must be positive; got {max_step_tokens}")
        self.cache = cache
        self.max_running = max_running
        self.max_step_tokens = max_step_tokens
        self.salt = salt
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []        # oldest first
        self.n_steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    def submit(self, requests: Iterable[Request]) -> None:
        """Queue requests.

        Raises:
            BadInput: a name is taken, a prompt is empty, or a request cannot fit the pool even
                alone. None of them was queued.
        """
        requests = list(requests)
        names = [r.name for r in [*self.waiting, *self.running, *requests]]
        for r in requests:
            require(names.count(r.name) == 1, f"two requests are called {r.name!r}")
            require(len(r.prompt) > 0, f"request {r.name!r} has an empty prompt")
            require(r.n_new > 0, f"request {r.name!r}: n_new must be positive; got {r.n_new}")
            require(r.n_samples > 0, f"request {r.name!r}: n_samples must be positive")
            # the last token is sampled, never stored
            blocks = ceil_div(len(r.prompt) + r.n_new - 1, self.cache.config.block_size)
            require(
                blocks <= self.cache.config.n_blocks,
                f"request {r.name!r} needs {blocks} blocks at its longest, the pool has "
                f"{self.cache.config.n_blocks}: shorten it, or build a larger pool",
            )
        self.waiting.extend(requests)

    def step(self) -> list[Work]:
        """Give blocks to everybody who runs in the next pass of the model, preempting if needed."""
        work, preempted = [], False
        for request in list(self.running):      # oldest first
            while request in self.running:
                try:
                    work.append(Work(request, self.cache.extend(request.name, 1)))
                    break
                except OutOfBlocks:
                    self._preempt(self.running[-1])
                    preempted = True
        while not preempted and self.waiting and len(self.running) < self.max_running:
            admitted = self._admit(self.waiting[0], sum(len(w.slots) for w in work))
            if admitted is None:
                break
            work.append(admitted)
        self.n_steps += 1
        record(Stepped(self.n_steps, tuple((w.request.name, len(w.slots)) for w in work)))
        return work

    def advance(self, request: Request, token: int) -> None:
        """The model has written all of the request's tokens and `token` was sampled next."""
        publish(self.cache, request.name, request.tokens, salt=self.salt)
        request.generated.append(token)
        if request.is_done:
            self.running.remove(request)
            self.cache.release(request.name)
            record(Finished(request.name, len(request.generated)))

    def family(self, request: Request) -> list[Request]:
        """The request and, if its prompt has just been computed, its `n_samples` - 1 forks."""
        family = [request]
        if not request.generated:
            for i in range(1, request.n_samples):
                family.append(self.fork(family[-1], f"{request.name}#{i}"))
        return family

    def fork(self, parent: Request, name: str) -> Request:
        """One more continuation of a running request, sharing all its blocks."""
        child = replace(parent, name=name, generated=list(parent.generated), n_samples=1)
        self.cache.fork(parent.name, name)
        self.running.insert(self.running.index(parent) + 1, child)
        return child

    def _admit(self, request: Request, n_scheduled: int) -> Work | None:
        n_known = len(find_prefix(self.cache, request.tokens, self.salt))
        n_compute = len(request.tokens) - n_known * self.cache.config.block_size
        if n_scheduled and n_scheduled + n_compute > self.max_step_tokens:
            return None
        try:
            n_reused, slots = admit(self.cache, request.name, request.tokens, salt=self.salt)
        except OutOfBlocks:
            return None
        self.running.append(self.waiting.popleft())
        n_most, resumed = len(request.prompt) + request.n_new, request.was_preempted
        record(Admitted(request.name, len(request.tokens), n_reused, n_most, resumed))
        return Work(request, slots)

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self.cache.release(request.name)
        request.was_preempted = True
        self.waiting.appendleft(request)
        record(Preempted(request.name, len(request.tokens)))


def rehearse(
    requests: Iterable[Request],
    texts: dict[str, list[int]],
    *,
    n_blocks: int,
    block_size: int,
    **limits: int,
) -> int:
    """Schedule requests whose continuations are known, without a model: passes it would take.

    What a request says does not depend on blocks, batching or preemption, so a recorded run can be
    replayed on another pool at once. `limits` are those of `Scheduler`. Samples of one request
    are called name, name#1, ... as in `attend.serve`, which wrote `texts`.
    """
    cache = PagedCache(CacheConfig(1, n_blocks, block_size, 1, 1))
    scheduler = Scheduler(cache, **limits)
    scheduler.submit(requests)
    while scheduler.has_work:
        for work in scheduler.step():
            for request in scheduler.family(work.request):
                scheduler.advance(request, texts[request.name][len(request.generated)])
    return scheduler.n_steps
