"""Batcher: answers the requests of many clients, on one thread that runs every model.

    batcher = Batcher({"d4_gka": engine}, rows=8, max_waiting=128)
    batcher.start(deliver)          # the thread calls deliver([(answer, outputs), ...])
    batcher.submit([Answer("d4_gka", request, streams=True)])
    batcher.cancel(answers)
    batcher.close()

Each model has one batch of the engine. Requests join it when a row is free and leave it between two steps. One thread
runs all models in turns, because a CUDA graph cannot be recorded while another thread uses the GPU.
"""

import itertools
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch

from gkachat.attention.cache import Cache
from gkachat.inference.engine import Batch, Engine, Request, TokenOutput

Deliveries = list[tuple["Answer", list[TokenOutput | Exception]]]
"""New outputs of some answers. An exception ends its answer."""

# Each delivery wakes the thread that talks to the clients, which takes Python's lock from this one.
SECONDS_BETWEEN_DELIVERIES = 0.05


class QueueFull(Exception):
    """No room for another answer."""


class Stopping(Exception):
    """The server stops: it takes no more requests, and ends those that have not finished in time."""


@dataclass(eq=False)
class Answer:
    """One text that a client waits for."""

    run: str
    """Name of the model."""
    request: Request
    streams: bool = False
    """Deliver outputs as they come, at most every SECONDS_BETWEEN_DELIVERIES. Otherwise all come at the end."""
    owner: Any = None
    """Where its outputs belong; only `deliver` looks at it."""


@dataclass
class _Lane:
    """Answers of one model."""

    batch: Batch
    waiting: deque[Answer] = field(default_factory=deque)
    """Answers without a row, the oldest first."""
    running: dict[int, Answer] = field(default_factory=dict)
    """Answers in rows of the batch, by the numbers that the batch knows them by."""
    cancelled: set[Answer] = field(default_factory=set)
    """Answers to be removed before the next step."""
    pending: dict[Answer, list[TokenOutput | Exception]] = field(default_factory=dict)
    """Outputs that have not been delivered."""

    def put(self, answer: Answer, output: TokenOutput | Exception) -> None:
        self.pending.setdefault(answer, []).append(output)


class Batcher:
    """Thread that answers requests. All methods may be called from any thread."""

    def __init__(self, engines: Mapping[str, Engine], rows: int, max_waiting: int):
        """Allocate the caches.

        Args:
            engines: engines by the names of their models, all on one device.
            rows: answers that one model generates at a time.
            max_waiting: answers of one model that may wait for a row.
        """
        self.capacity, self.max_waiting = rows + max_waiting, max_waiting
        self._lanes = {name: _Lane(engine.batch(rows)) for name, engine in engines.items()}
        self._device = next(iter(engines.values())).device
        self._calls: deque[tuple[Future, Callable[[], Any]]] = deque()
        self._changed = (
            threading.Condition()
        )  # its lock guards what clients change: `waiting`, `cancelled` and `_calls`
        self._numbers = itertools.count()
        self._deadline, self._closed = math.inf, False
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)

    def start(self, deliver: Callable[[Deliveries], None]) -> None:
        """Start the thread, which passes all outputs to `deliver`."""
        self._deliver = deliver
        self._thread.start()

    def submit(self, answers: Sequence[Answer]) -> None:
        """Queue answers of one model, all or none. Raises QueueFull if there is no room, or Stopping."""
        with self._changed:
            lane = self._lanes[answers[0].run]
            self._check(len(lane.waiting) + len(lane.running) + len(answers) > self.capacity)
            lane.waiting.extend(answers)
            self._changed.notify()

    def call(self, function: Callable[[], Any]) -> Future:
        """Run a function that uses a model between two steps. Raises QueueFull or Stopping."""
        with self._changed:
            self._check(len(self._calls) >= self.max_waiting)
            future: Future = Future()
            self._calls.append((future, function))
            self._changed.notify()
        return future

    def cancel(self, answers: Sequence[Answer]) -> None:
        """Drop answers, and free their rows before the next step. Those that have ended are ignored."""
        with self._changed:
            for answer in answers:
                self._lanes[answer.run].cancelled.add(answer)
            self._changed.notify()

    def count(self) -> int:
        """Return the number of answers that wait or have a row."""
        with self._changed:
            return sum(len(x.waiting) + max(len(x.running), len(x.batch)) for x in self._lanes.values())

    def cache(self, run: str) -> Cache:
        """Return the cache of a model's batch."""
        return self._lanes[run].batch.cache

    def drain(self, seconds: float) -> None:
        """Refuse further requests, and end answers that have not finished in time. Signal handlers may call this."""
        self._deadline = time.monotonic() + seconds

    def close(self) -> None:
        """End all answers, and then the thread."""
        self.drain(0)
        with self._changed:
            self._closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def _check(self, is_full: bool) -> None:
        if self._deadline < math.inf or not self._thread.is_alive():
            raise Stopping("the server is stopping")
        if is_full:
            raise QueueFull(f"{self.max_waiting} requests are waiting already; try again later")

    def _has_work(self) -> bool:
        lanes = self._lanes.values()
        return bool(self._closed or self._calls or any(x.waiting or x.running or x.cancelled for x in lanes))

    def _work(self) -> None:
        if self._device.type == "cuda":  # a thread starts with the first GPU
            torch.cuda.set_device(self._device)
        delivered = -math.inf
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work)
                calls = [self._calls.popleft() for _ in range(len(self._calls))]
            for future, function in calls:
                _complete(future, function)
            for lane in self._lanes.values():
                self._advance(lane)
            now = time.monotonic()
            if is_time := now - delivered > SECONDS_BETWEEN_DELIVERIES:
                delivered = now
            deliveries = [
                (answer, lane.pending.pop(answer))
                for lane in self._lanes.values()
                for answer, outputs in [*lane.pending.items()]
                if _is_end(outputs[-1]) or (is_time and answer.streams)
            ]
            if deliveries:
                self._deliver(deliveries)
            if self._closed:
                return

    def _advance(self, lane: _Lane) -> None:
        """Remove cancelled answers, read prompts into free rows, and draw a token for each row."""
        with self._changed:
            cancelled, lane.cancelled = lane.cancelled, set()
            if cancelled:
                lane.waiting = deque(answer for answer in lane.waiting if answer not in cancelled)
            for answer in cancelled:
                lane.pending.pop(answer, None)
            for number in [number for number, answer in lane.running.items() if answer in cancelled]:
                lane.batch.cancel(number)
                del lane.running[number]
        if time.monotonic() > self._deadline:
            self._fail(lane, Stopping("the server stopped before the answer was complete"), [*lane.waiting])
        for number in self._admitted(lane):
            try:
                output = lane.batch.add(number, lane.running[number].request)
            except Exception as error:
                logging.exception("a prompt could not be read")
                output = error
            self._store(lane, number, output)
        if lane.running:
            try:
                outputs = lane.batch.step()
            except Exception as error:  # the batch serves whoever comes next
                logging.exception("a decode step failed")
                self._fail(lane, error)
                return
            for output in outputs:
                self._store(lane, output.request, output)

    def _admitted(self, lane: _Lane) -> Iterator[int]:
        """Yield numbers for waiting answers, as long as there are free rows."""
        while lane.batch.has_room:
            with self._changed:
                if not lane.waiting:
                    return
                number = next(self._numbers)
                lane.running[number] = lane.waiting.popleft()
            yield number

    def _store(self, lane: _Lane, number: int, output: TokenOutput | Exception) -> None:
        """Store an output until it is delivered. An answer that has ended leaves `running`."""
        lane.put(lane.running.pop(number) if _is_end(output) else lane.running[number], output)

    def _fail(self, lane: _Lane, error: Exception, waiting: Sequence[Answer] = ()) -> None:
        """End all answers in rows, and some that wait, with an error."""
        with self._changed:
            answers = [*lane.running.values(), *waiting]
            for number in lane.running:
                lane.batch.cancel(number)
            lane.running.clear()
            for answer in waiting:
                lane.waiting.remove(answer)
        for answer in answers:
            lane.put(answer, error)


def _is_end(output: TokenOutput | Exception) -> bool:
    return isinstance(output, Exception) or bool(output.finished)


def _complete(future: Future, function: Callable[[], Any]) -> None:
    """Call the function, and give its result or its error to those who wait for the future."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:
        logging.exception("a call failed")
        future.set_exception(error)
