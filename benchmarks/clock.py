"""Time between marks: the clock of a CPU, or events on a GPU's stream.

On a GPU the L2 cache is flushed before each run, and a short spin keeps the stream busy while Python launches what is
to be measured: the events then stand around the kernels' own time and not around Python's. Contestants that launch
more than the queue or the spin can hold (an eager loop over time) do show Python's time: that is what they cost.
"""

from __future__ import annotations

import functools
import time

import torch
from torch import Tensor

LONGEST_HOLD = 0.02  # seconds of spin


@functools.cache
def _flusher(device: str) -> Tensor:
    """A buffer four times the size of the L2 cache, at least 64 MB; writing it evicts everything else."""
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
    return torch.empty(max(4 * cache, 1 << 26), dtype=torch.uint8, device=device)


@functools.cache
def _cycles_per_second(device: str) -> float:
    """Of the counter that the spin reads."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    cycles = 10_000_000
    with torch.cuda.device(device):
        torch.cuda._sleep(1000)
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        end.synchronize()
    return 1e3 * cycles / start.elapsed_time(end)


class Clock:
    """`start`, some `mark`s, `stop`: the seconds from each mark to the next, the first from the start."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._marks: list[float] = []
        self._events: list[torch.cuda.Event] = []
        self._launched = 0.0  # seconds that Python took from start to stop, at the last run
        self._started = 0.0

    def start(self) -> None:
        if self.device == "cpu":
            self._marks = [time.perf_counter()]
            return
        torch.cuda.synchronize(self.device)
        with torch.cuda.device(self.device):
            _flusher(self.device).zero_()
            hold = min(1.5 * self._launched, LONGEST_HOLD)
            if hold:
                torch.cuda._sleep(int(hold * _cycles_per_second(self.device)))
        self._events = []
        self._started = time.perf_counter()
        self.mark()

    def mark(self) -> None:
        if self.device == "cpu":
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        self._events.append(event)

    def stop(self) -> list[float]:
        if self.device == "cpu":
            return [b - a for a, b in zip(self._marks, self._marks[1:], strict=False)]
        self._launched = time.perf_counter() - self._started
        self._events[-1].synchronize()
        pairs = zip(self._events, self._events[1:], strict=False)
        return [a.elapsed_time(b) / 1e3 for a, b in pairs]


def wall(device: str) -> float:
    """Now, once the device has nothing left to do: for whole steps, Python included."""
    if device != "cpu":
        torch.cuda.synchronize(device)
    return time.perf_counter()
