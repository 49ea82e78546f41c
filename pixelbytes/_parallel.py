"""Data-parallel gradients on the CPU: each batch is cut into parts, one for this process and one for each worker process.

A step of a small model is many short operations. Threads share each of them, and wait for each other after each; a
process with its own rows waits once a step.

Shared memory holds the weights, written by the parent before each step, and the gradients of each worker. Rows and
losses go through a pipe. A worker ends when its pipe closes, so none outlives its parent.
"""

from __future__ import annotations

import contextlib
import pickle
import signal
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor

from pixelbytes._training import trimmed
from pixelbytes.models.common import SequenceModel

ALIGNMENT = 64  # bytes; of each tensor in a shared buffer
PATIENCE = 2.0  # seconds for a worker to end by itself


@dataclass
class _Failure:
    """What a worker answers when it cannot do its part."""

    reason: str
    trace: str


class _WorkerTrace(Exception):
    """Cause of the parent's error: the traceback in the worker."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


@dataclass
class _Worker:
    process: SpawnProcess
    pipe: Connection
    gradients: list[Tensor]  # shaped like the parameters


class GradientWorkers:
    """Within a with block, `processes - 1` worker processes that compute gradients beside this one.

    Each process gets an equal share of torch's threads. The workers choose their kernels by themselves
    (`pixelbytes_kernels.set_backend` does not reach them) and keep the buffers that the model has at the start.

    Args:
        model: on the CPU; picklable, so its class must be one that can be imported.
        processes: how many compute, at least 2.
        amp_dtype: of autocast; None for none.

    Raises:
        ValueError: the model cannot be sent to another process.
        RuntimeError: a worker failed or died; the message says of what. Nothing but the end of the block is left then.
    """

    def __init__(self, model: SequenceModel, processes: int, amp_dtype: torch.dtype | None = None) -> None:
        self.model, self.processes, self.amp_dtype = model, processes, amp_dtype
        self._parameters = list(model.parameters())
        self._weights: list[Tensor] = []
        self._workers: list[_Worker] = []
        self._threads = torch.get_num_threads()

    def __enter__(self) -> GradientWorkers:
        try:
            pickled = pickle.dumps(self.model)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise ValueError(f"processes: the model cannot be sent to another process: {error}") from error
        try:
            self._threads = torch.get_num_threads()
            torch.set_num_threads(max(1, self._threads // self.processes))
            weights = _shared_buffer(self._parameters)
            self._weights = _views(weights, self._parameters)
            with _no_ctrl_c_for_children():
                for number in range(1, self.processes):
                    self._workers.append(self._start(number, weights))
            for worker in self._workers:  # they import torch at the same time
                self._send(worker, pickled)
            for worker in self._workers:
                self._receive(worker)
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._close()

    def gradients(self, x: Tensor, target: Tensor) -> tuple[float, int]:
        """Add the gradients of the mean loss over all targets of a batch to `.grad`, which must be None.

        The batch is cut by rows into parts of nearly equal size, each trimmed to its own longest row. Their gradients are
        added in the order of the parts: the same batch and weights give the same bits.

        Args:
            x, target: as SequenceModel.loss takes them. With fewer rows than processes some have nothing to do.

        Returns:
            The mean loss, and the number of targets that it is the mean of.
        """
        with torch.no_grad():
            for shared, parameter in zip(self._weights, self._parameters, strict=True):
                shared.copy_(parameter)
        parts = min(self.processes, len(x))
        rows = zip(x.tensor_split(parts), target.tensor_split(parts), strict=True)
        own, *others = [trimmed(*part) for part in rows]
        busy = self._workers[: len(others)]
        for worker, part in zip(busy, others, strict=True):
            self._send(worker, tuple(tensor.numpy() for tensor in part))
        total, n_targets = _add_gradients(self.model, *own, self.amp_dtype)
        for worker in busy:
            part_total, part_targets, used = self._receive(worker)
            total, n_targets = total + part_total, n_targets + part_targets
            for index in used:
                parameter, gradient = self._parameters[index], worker.gradients[index]
                parameter.grad = gradient.clone() if parameter.grad is None else parameter.grad.add_(gradient)
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad.div_(max(n_targets, 1))
        return total / max(n_targets, 1), n_targets

    @contextlib.contextmanager
    def all_threads(self) -> Iterator[None]:
        """Within this block the workers rest, and this process has all threads."""
        share = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            yield
        finally:
            torch.set_num_threads(share)

    def _start(self, number: int, weights: Tensor) -> _Worker:
        context = torch.multiprocessing.get_context("spawn")  # a forked child has OpenMP's locks but not its threads
        gradients = _shared_buffer(self._parameters)
        ours, theirs = context.Pipe()
        process = context.Process(
            target=_work,
            args=(theirs, weights, gradients, self.amp_dtype, torch.get_num_threads()),
            name=f"training process {number + 1}",
            daemon=True,
        )
        process.start()
        theirs.close()  # so that the pipe ends with the worker
        return _Worker(process, ours, _views(gradients, self._parameters))

    def _send(self, worker: _Worker, task: Any) -> None:
        try:
            worker.pipe.send(task)
        except OSError as error:
            raise _death(worker.process) from error

    def _receive(self, worker: _Worker) -> Any:
        try:
            answer = worker.pipe.recv()
        except (EOFError, OSError) as error:
            raise _death(worker.process) from error
        if isinstance(answer, _Failure):
            raise RuntimeError(f"{worker.process.name}: {answer.reason}") from _WorkerTrace(answer.trace)
        return answer

    def _close(self) -> None:
        for worker in self._workers:
            with contextlib.suppress(OSError):
                worker.pipe.send(None)  # a process that loads data may hold a copy of our end of the pipe
            worker.pipe.close()
        for worker in self._workers:
            worker.process.join(PATIENCE)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.process.close()
        self._workers, self._weights = [], []
        torch.set_num_threads(self._threads)


def _work(pipe: Connection, weights: Tensor, gradients: Tensor, amp_dtype: torch.dtype | None, threads: int) -> None:
    """The worker: takes the pickled model, then parts of batches, until None or the end of the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's
    warnings.simplefilter("ignore")  # the parent computes the same and warns of it
    torch.set_num_threads(threads)
    model: Any = None
    with contextlib.suppress(EOFError, OSError):
        while (task := pipe.recv()) is not None:
            answer: Any = None
            try:
                if model is None:
                    model = pickle.loads(task).train()
                    parameters = list(model.parameters())
                    shared = _views(gradients, parameters)
                    for parameter, weight in zip(parameters, _views(weights, parameters), strict=True):
                        parameter.data = weight
                else:
                    model.zero_grad(set_to_none=True)
                    x, target = map(torch.from_numpy, task)
                    total, n_targets = _add_gradients(model, x, target, amp_dtype)
                    used = [index for index, parameter in enumerate(parameters) if parameter.grad is not None]
                    for index in used:
                        shared[index].copy_(parameters[index].grad)
                    answer = total, n_targets, used
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                answer = _Failure(reason, traceback.format_exc())
            pipe.send(answer)


def _add_gradients(model: SequenceModel, x: Tensor, target: Tensor, amp_dtype: torch.dtype | None) -> tuple[float, int]:
    """Gradients of the loss summed over the targets, so that those of parts can be added; the sum, and their number."""
    with torch.autocast("cpu", dtype=amp_dtype, enabled=amp_dtype is not None):
        loss, n_targets = model.loss(x, target)
    total = loss * n_targets
    total.backward()
    return total.item(), n_targets


def _shared_buffer(tensors: Sequence[Tensor]) -> Tensor:
    """Zeroed bytes in shared memory with room for `tensors`. One piece: each would take a file descriptor."""
    return torch.zeros(sum(map(_padded_bytes, tensors)), dtype=torch.uint8).share_memory_()


def _views(buffer: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Tensors in the buffer, of the dtypes and shapes of `tensors`."""
    pieces = buffer.split([_padded_bytes(tensor) for tensor in tensors])
    return [
        piece[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for piece, tensor in zip(pieces, tensors, strict=True)
    ]


def _padded_bytes(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def _death(process: SpawnProcess) -> RuntimeError:
    process.join(PATIENCE)
    return RuntimeError(
        f"{process.name} ended unexpectedly with exit code {process.exitcode} (negative: by that signal, -9 may be want "
        "of memory). A script that asks for several processes needs 'if __name__ == \"__main__\":' around what it does"
    )


@contextlib.contextmanager
def _no_ctrl_c_for_children() -> Iterator[None]:
    """Processes started within this block never get SIGINT, not even while they import. Ours comes after the block."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # its start would lift the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
