"""Resuming persistent contexts: from disk by block, beside whole-context swap and drop-and-recompute.

    python benchmarks/contexts.py MODEL.gguf [--json]
    python benchmarks/contexts.py MODEL.gguf --kv-bits 4        resume alone, of a context with fewer bits on disk

Engine, scheduler and disk tier in one process, as the engine process runs them; time is from the request's arrival to
its first token, 1 new token after the history. Page cache: ours reads with O_DIRECT, so there is none to help it; the
file is dropped from it as well, and so are the files of the whole-context swap, before each access.

resume  a turn on a context of 2,048 tokens after a restart, against prefilling as many cold (median of --repeats)
switch  100 contexts of 1,024 tokens, 256 MB of KV memory, random order with a fixed seed; p95 over --switches.
        Each access appends to its context. Ours writes the turn's new blocks ahead of time, in the pause after the
        turn; whole-context swap writes a context when it must go and reads it whole when it comes, in memory as one
        piece; recompute drops and prefills. A pause lets the writer finish, as an app's thinking time would. The
        contexts' first KV is one context's, copied under the keys of all: time does not see the values.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

import machine
from hob.config import EngineConfig, SchedulerConfig
from hob.engine.base import BLOCK_SIZE
from hob.engine.local import LocalEngine
from hob.kvcache.compression import EXACT, MIXED, Codec
from hob.kvcache.keys import KeyRing
from hob.kvcache.pool import num_blocks_for
from hob.kvcache.store import BlockStore
from hob.kvcache.swap import Swap
from hob.models.pack import ensure_packed
from hob.request import Request, SamplingParams, ServiceClass
from hob.scheduler.scheduler import Scheduler
from hob.service.step import pump, run_step

MAX_ROWS = 512
RESUME_TOKENS = 2048
SWITCH_CONTEXTS = 100
SWITCH_TOKENS = 1024
KV_BYTES = 256 << 20
DISK_BYTES = 8 << 30


class Host:
    """One engine, with a scheduler and a disk tier that can be opened anew, as after a restart."""

    def __init__(self, model: Path, folder: Path, kv_bits: int = EXACT) -> None:
        self.engine = LocalEngine("benchmark", ensure_packed(model), EngineConfig(), MAX_ROWS)
        self.folder = folder
        self.kv_bits = kv_bits
        self.swap: Swap | None = None
        self._num_requests = 0

    def open(self, num_blocks: int, *, has_disk: bool = True, has_prefix_cache: bool = True) -> None:
        """A cold pool."""
        self.close()
        self.engine.open_pool(num_blocks)
        ring = KeyRing(self.folder / "keys", {})
        if has_disk:
            codec = Codec(self.engine.kv_shape)
            store = BlockStore(self.folder / "kv", "benchmark", self.engine.block_bytes, ring, DISK_BYTES, codec=codec)
            self.swap = Swap(store)
        config = SchedulerConfig(prefix_cache=has_prefix_cache)
        info = self.engine.info
        self.scheduler = Scheduler(config, num_blocks, info.context_length, info.vocab_size, self.swap, ring.salt)
        if self.swap is not None:
            self.swap.recompute_s = self.scheduler.cost.prompt_s

    def close(self) -> None:
        """Write what is to be written."""
        if self.swap is not None:
            self.rest()
            self.swap.close()
            self.swap = None

    def first_token(self, token_ids: list[int], context_id: str | None = None) -> tuple[float, int]:
        """Seconds to the first token, and the token."""
        self._num_requests += 1
        sampling = SamplingParams(max_tokens=1, temperature=0.0)
        start = time.perf_counter()
        request = Request(
            f"r{self._num_requests}",
            "app",
            token_ids,
            sampling=sampling,
            service_class=ServiceClass.INTERACTIVE,
            context_id=context_id,
            kv_bits=self.kv_bits,
        )
        self.scheduler.add(request, time.monotonic())
        while True:
            outputs = run_step(self.engine, self.scheduler, time.monotonic, self.swap)
            if outputs is None and self.swap is not None:
                select.select([self.swap], [], [], 0.005)
            for output in outputs or []:
                if output.error is not None:
                    raise SystemExit(f"the step failed: {output.error.message}")
                return time.perf_counter() - start, output.token_ids[0]

    def rest(self) -> None:
        """The pause after a turn."""
        assert self.swap is not None
        pump(self.engine, self.scheduler, self.swap)
        self.swap.drain(self.engine, self.scheduler.placement.prefixes.find)


def drop_page_cache(*files: Path) -> None:
    """Forget what the kernel keeps of these files; of all, where we may."""
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def tokens_of(length: int, vocab_size: int, seed: int) -> list[int]:
    """A history: text does not matter to time."""
    return random.Random(seed).choices(range(100, vocab_size - 100), k=length)


def resume(host: Host, repeats: int) -> dict[str, float]:
    """A turn of one new token on a context of 2,048 after a restart: from disk, and computed."""
    vocab_size = host.engine.info.vocab_size
    history = tokens_of(RESUME_TOKENS - 1, vocab_size, 0)
    num_blocks = num_blocks_for(RESUME_TOKENS + 4 * repeats + BLOCK_SIZE)
    prefill, restored = [], []
    for seed in range(max(repeats // 3, 1)):
        host.open(num_blocks, has_disk=False)
        prefill.append(host.first_token(tokens_of(RESUME_TOKENS + 1, vocab_size, seed))[0])
    host.open(num_blocks)
    history.append(host.first_token(history, "resume")[1])
    for _ in range(repeats):
        host.open(num_blocks)
        drop_page_cache(*(host.folder / "kv").glob("*.slab"))
        history.append(777)
        seconds, token = host.first_token(history, "resume")
        history.append(token)
        restored.append(seconds)
    host.open(num_blocks, has_disk=False)
    expected = host.first_token(history[:-1])[1]
    if history[-1] != expected and host.kv_bits == EXACT:
        raise SystemExit(f"a restored context gave token {history[-1]}, a computed one {expected}")
    shutil.rmtree(host.folder / "kv")
    return {
        "resume_ms": 1e3 * statistics.median(restored),
        "resume_p95_ms": p95_ms(restored),
        "prefill_ms": 1e3 * statistics.median(prefill),
        "resume_speedup": statistics.median(prefill) / statistics.median(restored),
    }


def order_of(num_switches: int) -> list[int]:
    """Which context is called, one after the other."""
    rng = random.Random(1)
    return [rng.randrange(SWITCH_CONTEXTS) for _ in range(num_switches)]


def histories_of(host: Host) -> list[list[int]]:
    return [tokens_of(SWITCH_TOKENS, host.engine.info.vocab_size, 1 + i) for i in range(SWITCH_CONTEXTS)]


def fill(host: Host, histories: list[list[int]]) -> None:
    """Contexts on disk without computing each: the first one's KV under every key. Time does not see the values."""
    host.first_token(histories[0], "first")
    host.rest()
    assert host.swap is not None
    prefixes = host.scheduler.placement.prefixes
    images: list[bytes] = []
    for i, history in enumerate(histories):
        keys: list[bytes] = []
        prefixes.extend_keys("app", history, keys, len(history))
        if not images:
            images = [host.engine.read_block(b) for key in keys if (b := prefixes.find("app", key)) is not None]
        host.swap.store.write("app", f"c{i}", keys, dict(zip(keys, images, strict=True)))


def switch_ours(host: Host, num_switches: int) -> list[float]:
    """By block, ahead of time."""
    histories = histories_of(host)
    host.open(KV_BYTES // host.engine.block_bytes)
    fill(host, histories)
    times = []
    for i in order_of(num_switches):
        drop_page_cache(*(host.folder / "kv").glob("*.slab"))
        histories[i].append(777)
        seconds, token = host.first_token(histories[i], f"c{i}")
        histories[i].append(token)
        times.append(seconds)
        host.rest()
    assert host.swap is not None
    print(
        f"{num_switches} switches: {host.swap.num_read} blocks read, {host.swap.num_written} written, "
        f"{host.swap.num_lost} lost",
        file=sys.stderr,
    )
    host.close()
    shutil.rmtree(host.folder / "kv")
    return times[num_switches // 5 :]  # memory fills up first


def switch_recompute(host: Host, num_switches: int) -> list[float]:
    """What is not in memory is computed again."""
    histories = histories_of(host)
    host.open(KV_BYTES // host.engine.block_bytes, has_disk=False)
    times = []
    for i in order_of(num_switches):
        histories[i].append(777)
        seconds, token = host.first_token(histories[i])
        histories[i].append(token)
        times.append(seconds)
    return times


def switch_whole(host: Host, num_switches: int) -> list[float]:
    """Contexts come and go whole, one file each, plain reads and writes: what a swap of address spaces would do."""
    folder = host.folder / "whole"
    folder.mkdir()
    blocks_each = num_blocks_for(SWITCH_TOKENS + 2 * num_switches // SWITCH_CONTEXTS + BLOCK_SIZE)
    lanes = KV_BYTES // host.engine.block_bytes // blocks_each
    host.engine.open_pool(lanes * blocks_each)
    image = os.urandom(blocks_each * host.engine.block_bytes)
    for i in range(SWITCH_CONTEXTS):
        (folder / str(i)).write_bytes(image)
    drop_page_cache(*folder.iterdir())
    resident: OrderedDict[int, int] = OrderedDict()
    step_s = statistics.median(_tail_step(host) for _ in range(5))
    times = []
    for i in order_of(num_switches):
        drop_page_cache(folder / str(i))
        start = time.perf_counter()
        if i not in resident:
            lane = len(resident)
            if lane == lanes:
                gone, lane = resident.popitem(last=False)
                first = lane * blocks_each
                data = b"".join(host.engine.read_block(b) for b in range(first, first + blocks_each))
                (folder / str(gone)).write_bytes(data)
            data = (folder / str(i)).read_bytes()
            for b in range(blocks_each):
                size = host.engine.block_bytes
                host.engine.write_block(lane * blocks_each + b, data[b * size : (b + 1) * size])
            resident[i] = lane
        resident.move_to_end(i)
        times.append(time.perf_counter() - start + step_s)
        drop_page_cache(*folder.iterdir())  # the pause: what was written reaches the disk
    shutil.rmtree(folder)
    return times


def _tail_step(host: Host) -> float:
    """Seconds of the step that every policy ends with: two tokens after 1,024."""
    import numpy as np

    from hob.engine.base import Batch, Out

    blocks = num_blocks_for(SWITCH_TOKENS + 2)
    index = np.arange(SWITCH_TOKENS, SWITCH_TOKENS + 2, dtype=np.int32)
    start = time.perf_counter()
    host.engine.forward(
        Batch(
            token=np.array([777, 778], np.int32),
            position=index,
            index=index,
            out=np.array([Out.NONE, Out.LOGITS], np.uint8),
            target=np.zeros(2, np.int32),
            row_start=np.array([0, 2], np.int32),
            table_start=np.array([0, blocks], np.int32),
            blocks=np.arange(blocks, dtype=np.int32),
            adapter=np.zeros(1, np.int32),
        )
    )
    return time.perf_counter() - start


def p95_ms(seconds: list[float]) -> float:
    """95th percentile, in milliseconds."""
    return 1e3 * statistics.quantiles(seconds, n=20)[-1]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--folder", type=Path, help="where the files are written; default: a temporary folder")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--switches", type=int, default=200)
    parser.add_argument("--kv-bits", type=int, choices=(EXACT, 8, 4, MIXED), default=EXACT)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    if os.geteuid() == 0:
        subprocess.run(["sh", "-c", "sync; echo 3 > /proc/sys/vm/drop_caches"], check=False)
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        steal = machine.CpuTimes.now()
        host = Host(given.model, Path(folder), given.kv_bits)
        resumed = resume(host, given.repeats)
        if given.kv_bits != EXACT:
            print(json.dumps({"kv_bits": given.kv_bits, **{name: round(value, 1) for name, value in resumed.items()}}))
            return
        ours = switch_ours(host, given.switches)
        recompute = switch_recompute(host, min(given.switches, 20))
        whole = switch_whole(host, min(given.switches, 40))
        result: dict[str, Any] = {
            "ours": {
                "resume_speedup": round(resumed["resume_speedup"], 1),
                "resume_ms": round(resumed["resume_ms"], 1),
                "resume_p95_ms": round(resumed["resume_p95_ms"], 1),
                "switch_p95_ms": round(p95_ms(ours), 1),
                "switch_median_ms": round(1e3 * statistics.median(ours), 1),
            },
            "baselines": {
                "prefill_ms": round(resumed["prefill_ms"], 1),
                "recompute_switch_p95_ms": round(p95_ms(recompute), 1),
                "whole_swap_switch_p95_ms": round(p95_ms(whole), 1),
                "whole_swap_switch_median_ms": round(1e3 * statistics.median(whole), 1),
            },
            "machine": {**machine.describe(), "steal_share": round(steal.steal_share_since(), 3)},
        }
    if given.json:
        print(json.dumps(result))
        return
    table = Table("figure", "ours", "whole-context swap", "drop and recompute", "goal")
    one, other = result["ours"], result["baselines"]
    table.add_row("resume 2,048 tokens, ms", f"{one['resume_ms']}", "", f"{other['prefill_ms']}", "120")
    table.add_row("  times faster than prefill", f"{one['resume_speedup']}", "", "1", "25")
    table.add_row(
        "switch among 100, p95 ms",
        f"{one['switch_p95_ms']}",
        f"{other['whole_swap_switch_p95_ms']}",
        f"{other['recompute_switch_p95_ms']}",
        "40",
    )
    Console().print(table)


if __name__ == "__main__":
    main()
