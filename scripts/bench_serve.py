"""Time the server against the engine alone, and count the sequences whose caches fit in the same memory.

python -m scripts.bench_serve d4_softmax d4_gka
python -m scripts.bench_serve d4_softmax d4_gka --clients 8 64 --tokens 128 --rounds 5 --out results/serve

Both answer the same requests with the same number of rows. Clients are threads of this process; each sends a request
when its last one is answered. Streams have one event per token. On a machine with other work, compare the CPU time of
the process that runs the model: the server's contains HTTP and JSON.
"""

import contextlib
import ctypes
import json
import os
import resource
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.client import HTTPConnection
from typing import TYPE_CHECKING, Any

from scripts.cli import benchmark_parser, parse_benchmark, positive, run

if TYPE_CHECKING:
    import torch

    from gkachat.config import GPTConfig

PROMPTS = ["import os\n", "def f(x):\n    return", "class A:\n    def __init__(self", "# A loop\nfor i in range("]
SHAPES = {"laptop": {"depth": 4, "n_embd": 192, "head_dim": 64, "sequence_len": 256}, "d20": {"depth": 20}}


def main() -> None:
    parser = benchmark_parser(__doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="names of runs, or paths of their directories")
    parser.add_argument("--rows", type=positive, default=8, help="answers generated at a time")
    parser.add_argument("--clients", type=positive, nargs="+", default=[8], help="clients at once")
    parser.add_argument("--requests", type=positive, default=32, help="requests of one sample")
    parser.add_argument("--tokens", type=positive, default=64, help="tokens of an answer, at most")
    parser.add_argument("--memory", type=positive, default=1024, help="MiB of the cache that sequences are counted in")
    options, device, dtype = parse_benchmark(parser)
    from gkachat.benchmark import publish, table
    from gkachat.checkpoint import find_run
    from gkachat.config import ATTENTIONS, GPTConfig

    speeds = [row for run_name in options.runs for row in compare(find_run(run_name), options, device)]
    memory = [
        {"shape": shape, "name": name}
        | sequences(GPTConfig(attention=name, **sizes), options.memory << 20, dtype, device)
        for shape, sizes in SHAPES.items()
        for name in ATTENTIONS
    ]
    text = f"{table(speeds, SPEED)}\n{table(memory, MEMORY)}"
    settings = {key: vars(options)[key] for key in ("rows", "requests", "tokens", "memory", "rounds")}
    result = {**settings, "dtype": str(dtype), "speed": speeds, "caches": memory}
    publish("The server, timed", result, text, device, options.out)


def compare(run_dir: Any, options: Any, device: "torch.device") -> list[dict[str, Any]]:
    """Time the engine in this process, and a server in its own, in turns; return a row of the table for each."""
    from gkachat.benchmark import benchmark
    from gkachat.inference.chat import ChatSession
    from gkachat.inference.sampling import Sampling

    session = ChatSession.from_run(run_dir, device=str(device))
    engine, written, cpu, counts = session.engine, Counter(), Counter(), set()
    asks = [
        {"prompt": PROMPTS[i % len(PROMPTS)], "seed": i, "max_tokens": options.tokens} for i in range(options.requests)
    ]
    requests = [
        session.request([0, *engine.tokenizer.encode(ask["prompt"])], Sampling(ask["max_tokens"], seed=ask["seed"]))
        for ask in asks
    ]

    def measured(name: str, pid: int, work: Callable[[], int]) -> Callable[[], None]:
        """Return a function that works, and adds up the tokens that were written and the seconds of a process."""

        def run() -> None:
            before = seconds_of(pid)
            counts.add(n := work())
            written[name] += n
            cpu[name] += seconds_of(pid) - before

        return run

    def alone() -> int:
        return sum(output.token is not None for output in engine.run(requests, rows=options.rows))

    threads = [] if options.threads is None else ["--threads", str(options.threads)]
    command = [sys.executable, "-m", "scripts.serve", str(run_dir), "--port=0", f"--rows={options.rows}", *threads]
    with subprocess.Popen([*command, f"--device={device}"], stdout=subprocess.PIPE, text=True) as server:
        try:
            host = server.stdout.readline().rpartition("//")[2].strip("/\n")
            contestants = {"engine alone": measured("engine alone", os.getpid(), alone)}
            for clients in options.clients:
                for stream in (False, True):
                    name = f"server, {clients} clients, {'streams' if stream else 'whole answers'}"
                    ask = partial(ask_all, host, session.name, asks, clients, stream)
                    contestants[name] = measured(name, server.pid, ask)
            timings = benchmark(contestants, device, options.rounds)
        finally:
            server.terminate()
    if len(counts) > 1:
        raise ValueError(f"expected as many tokens from the server as from the engine, given {sorted(counts)}")
    [n], engine_seconds = counts, timings["engine alone"].median
    cpu_seconds = {name: cpu[name] / written[name] for name in timings}
    return [
        {
            "run": session.name, "name": name, "tokens_per_second": n / timing.median,
            "low": n / timing.high, "high": n / timing.low, "share": engine_seconds / timing.median,
            "cpu_ms": 1000 * cpu_seconds[name], "cpu_share": cpu_seconds["engine alone"] / max(1e-9, cpu_seconds[name]),
        }
        for name, timing in timings.items()
    ]  # fmt: skip


def ask_all(host: str, model: str, asks: list[dict[str, Any]], n_clients: int, stream: bool) -> int:
    """Send requests from some clients at once; return the number of tokens that were written."""
    local = threading.local()

    def ask(settings: dict[str, Any]) -> int:
        if not hasattr(local, "connection"):
            local.connection = HTTPConnection(host, timeout=300)
        body = {"model": model, "stream": stream, "stream_options": {"include_usage": True}, **settings}
        local.connection.request(
            "POST", "/v1/completions", json.dumps(body), headers={"Content-Type": "application/json"}
        )
        data = local.connection.getresponse().read().decode()
        last = data.split("\n\n")[-3].removeprefix("data: ") if stream else data  # before [DONE]
        return json.loads(last)["usage"]["completion_tokens"]

    with ThreadPoolExecutor(n_clients) as pool:
        return sum(pool.map(ask, asks))


def seconds_of(pid: int) -> float:
    """Return the CPU seconds of a process and its threads so far (proc(5): utime and stime)."""
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def sequences(config: "GPTConfig", n_bytes: int, dtype: "torch.dtype", device: "torch.device") -> dict[str, Any]:
    """Return how many sequences of a full context fit in n_bytes of cache, by the account and as allocated."""
    import torch

    from gkachat.inference.engine import BLOCK
    from gkachat.model.gpt import GPT
    from gkachat.model.stats import model_stats

    with torch.device("meta"):
        model = GPT(config, dtype)
    context = config.sequence_len
    per_row = model.make_cache(1, context, block=BLOCK).n_bytes
    fit = n_bytes // per_row
    model.wte.to_empty(device=device)  # the cache is on the embedding's device
    before = held_bytes(device)
    cache = model.make_cache(fit, context, block=BLOCK)
    for buffers in cache.layers:
        for buffer in buffers.values():
            buffer.fill_(1)  # a CPU's pages are there once they are written
    held = held_bytes(device) - before
    account = model_stats(config).cache_bytes_per_token * dtype.itemsize // 2  # it counts bfloat16, windows not
    return {
        "context": context, "account": account, "counted": n_bytes // (account * context), "per_row": per_row,
        "fit": fit, "held_mib": held / 2**20,
    }  # fmt: skip


def held_bytes(device: "torch.device") -> int:
    """Return the bytes that are held now: by the device's allocator on cuda, by this process elsewhere."""
    import torch

    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(AttributeError):  # glibc alone has it: freed memory that it keeps is not to be counted
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


SPEED = {
    "": "{run}",
    "what": "{name}",
    "tokens/s (low to high)": "{tokens_per_second:,.0f} ({low:,.0f} to {high:,.0f})",
    "of the engine": "{share:.2f}",
    "CPU ms per token": "{cpu_ms:.3f}",
    "engine's CPU time over it": "{cpu_share:.2f}",
}
MEMORY = {
    "": "{shape}, context {context}: {name}",
    "cache bytes per token, counted": "{account:,}",
    "sequences, counted": "{counted:,}",
    "bytes per sequence, allocated": "{per_row:,}",
    "sequences, allocated": "{fit:,}",
    "MiB held": "{held_mib:,.1f}",
}


if __name__ == "__main__":
    run(main)
