"""Resident models in virtual time: real residents, ledger, schedulers and pools; fake engines; nothing to wait for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hob.config import SchedulerConfig
from hob.engine.base import BLOCK_SIZE
from hob.engine.fake import CostModel, FakeClock, FakeEngine, _mix
from hob.errors import ModelFileError
from hob.messages import Answer, LeasesEnded, ModelSpec, Unloaded
from hob.request import Request, SamplingParams, SequenceOutput, ServiceClass
from hob.scheduler.scheduler import Scheduler
from hob.service.ledger import Ledger
from hob.service.resident import Footprint, Opened
from hob.service.residents import ResidencyConfig, Residents
from hob.service.stepping import Stepper
from hob.service.totals import stats_of
from hob.service.workers import Workers

MB = 1_000_000
BLOCK_BYTES = 8 * BLOCK_SIZE
PAGE_BYTES = 4 * BLOCK_BYTES
KV_TOKENS = 4096
BUDGET = 20 * MB
VOCAB = 10_000


@dataclass
class FakeOpener:
    """Opens fake engines, each of the size it is told."""

    clock: FakeClock
    sizes: dict[str, int]
    config: SchedulerConfig = field(default_factory=SchedulerConfig)
    cost: CostModel = field(default_factory=CostModel)
    broken: set[str] = field(default_factory=set)
    engines: dict[str, FakeEngine] = field(default_factory=dict)
    prepare: Callable[[str, Opened], None] = lambda name, opened: None

    def footprint(self, spec: ModelSpec) -> Footprint:
        """Weights as told, nothing else."""
        return Footprint(self.sizes[spec.name], 0, BLOCK_BYTES, PAGE_BYTES)

    def open(self, spec: ModelSpec, num_blocks: int) -> Opened:
        """At once."""
        if spec.name in self.broken:
            raise ModelFileError(f"{spec.name} is damaged")
        engine = FakeEngine(vocab_size=VOCAB, name=spec.name, cost=self.cost, sleep=self.clock.sleep)
        engine.open_pool(num_blocks)
        self.engines[spec.name] = engine
        opened = Opened(engine, Scheduler(self.config, num_blocks, 8192, VOCAB))
        self.prepare(spec.name, opened)
        return opened


class House:
    """A service of several models, without processes."""

    def __init__(
        self, sizes: dict[str, int], budget: int = BUDGET, limits: ResidencyConfig | None = None, default: str = "a"
    ) -> None:
        self.clock = FakeClock()
        self.ledger = Ledger(budget)
        self.opener = FakeOpener(self.clock, sizes)
        limits = limits or ResidencyConfig(kv_tokens=KV_TOKENS)
        self.residents = Residents(
            self.ledger, self.opener, Workers(is_threaded=False), default, limits, SchedulerConfig()
        )
        self.stepper = Stepper(self.residents, self.clock)
        self.outputs: dict[str, list[SequenceOutput]] = {}
        self.times: dict[str, list[float]] = {}
        self.answers: dict[int, Answer] = {}
        self.unloaded: list[str] = []
        self.ended: list[tuple[str, str]] = []
        """Leases that the house ended: app and model."""
        self.peak_bytes = 0
        for name in sizes:
            self.residents.know(ModelSpec(name, ""))

    def ask(
        self,
        name: str,
        model: str,
        num_prompt: int = 40,
        max_tokens: int = 8,
        service_class: ServiceClass = ServiceClass.STANDARD,
        app: str = "app",
        deadline_s: float | None = None,
    ) -> None:
        """Submit a request; prompts of one length are equal."""
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        request = Request(
            name,
            app,
            list(range(num_prompt)),
            model=model,
            sampling=sampling,
            service_class=service_class,
            ttft_deadline_s=deadline_s,
        )
        self.residents.submit(request, self.clock.now)

    def step(self) -> bool:
        """One turn of the loop. False: there was nothing to compute."""
        self.residents.tick(self.clock.now)
        computed = self.stepper.step()
        for output in [*(computed or []), *self.residents.room.outputs]:
            self.outputs.setdefault(output.request_id, []).append(output)
            if output.token_ids:
                self.times.setdefault(output.request_id, []).append(self.clock.now)
        for message in self.residents.room.messages:
            if isinstance(message, Answer):
                self.answers[message.call_id] = message
            elif isinstance(message, Unloaded):
                self.unloaded.append(message.name)
            elif isinstance(message, LeasesEnded):
                self.ended += [(app, message.name) for app in message.apps]
        self.residents.room.outputs, self.residents.room.messages = [], []
        self.residents.check()
        for resident in self.residents:
            stats_of(resident)
        self.peak_bytes = max(self.peak_bytes, self.ledger.reserved_bytes)
        return bool(computed)

    def run(self, seconds: float = 30.0) -> None:
        """Until nothing is left to do, or time is up."""
        end = self.clock.now + seconds
        while self.clock.now < end:
            if not self.step():
                if not self.residents.has_work and not self.residents.is_changing and not self.residents._wanted:
                    self.step()  # hands over what the last turn brought
                    return
                self.clock.sleep(0.05)

    def tokens(self, name: str) -> list[int]:
        """What a request was given."""
        return [token for output in self.outputs.get(name, []) for token in output.token_ids]

    def error(self, name: str) -> str | None:
        """How a request failed, if it did."""
        return next((o.error.name for o in self.outputs.get(name, []) if o.error is not None), None)

    def is_done(self, name: str) -> bool:
        """Whether it ended, well or not."""
        return any(output.finish_reason is not None for output in self.outputs.get(name, []))

    @property
    def loaded(self) -> set[str]:
        """Resident models."""
        return {resident.name for resident in self.residents}


def solo(num_prompt: int, max_tokens: int) -> list[int]:
    """The reply of a fake engine that has nothing else to do."""
    digest = 0
    for token in range(num_prompt):
        digest = _mix(digest, token)
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        tokens.append(digest % VOCAB)
        digest = _mix(digest, tokens[-1])
    return tokens
