"""The processes of one training run: who they are, what they agree on, and how the first failure ends them all.

Started by torchrun, which sets RANK, WORLD_SIZE, LOCAL_RANK and where the processes meet. All hold the same weights; each takes its share
of every batch. Rank 0, the writer, alone touches the run folder. Decisions travel between the hosts by gloo, so that no device is waited
for; gradients by NCCL on CUDA and by gloo on the CPU.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastcm.errors import InputError, PeerError, RunError, reason_of

# How long a process waits for the others within a step, and while the writer decodes, samples, evaluates or saves.
STEP_TIMEOUT, WORK_TIMEOUT = timedelta(minutes=10), timedelta(hours=12)
FAILURE = "failure"


class LostPeerError(RunError):
    """A process of the run ended, or fell silent, while the others waited for it."""


class Processes:
    """This process among those of the run. Alone, it agrees with itself and waits for nobody."""

    def __init__(self, rank: int = 0, size: int = 1, *, local_rank: int = 0, store: dist.Store | None = None):
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._store = store
        self._steps = dist.new_group(backend="gloo", timeout=STEP_TIMEOUT) if size > 1 else None
        self._work = dist.new_group(backend="gloo", timeout=WORK_TIMEOUT) if size > 1 else None
        self.gradient_group = self._steps

    @property
    def is_writer(self) -> bool:
        return self.rank == 0

    def use(self, device: torch.device) -> None:
        """Readies this process to compute on `device`: its own GPU, or its part of the cores."""
        if self.size == 1:
            return
        if device.type == "cuda":
            if self.local_rank >= torch.cuda.device_count():
                raise InputError(f"more processes than GPUs in --nproc-per-node: {self.local_rank + 1}. Use {torch.cuda.device_count()}.")
            torch.cuda.set_device(self.local_rank)
            self.gradient_group = dist.new_group(backend="nccl", timeout=STEP_TIMEOUT)
        elif os.environ.get("OMP_NUM_THREADS", "1") == "1":  # torchrun's own choice for several processes, which leaves cores idle
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", self.size))))

    def share(self, batch: int) -> int:
        """Images of every batch that each process takes."""
        if batch % self.size:
            raise InputError(f"batch that the processes do not divide in --batch: {batch} ({self.size} processes). Use a multiple of them.")
        return batch // self.size

    def agree(self, *flags: int) -> tuple[int, ...]:
        """The largest value of each flag over the processes, the same in all of them."""
        if self.size == 1:
            return flags
        tensor = torch.tensor(flags, dtype=torch.int64)
        with told():
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self._steps)
        return tuple(tensor.tolist())

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, in place, on the tensor's device."""
        if self.size > 1:
            with told():
                dist.all_reduce(tensor, group=self.gradient_group)
        return tensor

    def barrier(self) -> None:
        """Waits until all processes are here; the writer may come late from its work."""
        if self.size > 1:
            with told():
                dist.all_reduce(torch.zeros(1), group=self._work)

    @contextmanager
    def writer_first(self) -> Iterator[None]:
        """The writer's turn, then everybody else's: what it decodes or downloads, they find."""
        if not self.is_writer:
            self.barrier()
        yield
        if self.is_writer:
            self.barrier()

    def from_writer(self, value: Any) -> Any:
        """The writer's JSON-ready value, in every process."""
        if self.size == 1:
            return value
        text = json.dumps(value).encode() if self.is_writer else b""
        (length,) = self.agree(len(text))
        tensor = torch.frombuffer(bytearray(text.ljust(length)), dtype=torch.uint8)
        with told():
            dist.broadcast(tensor, src=0, group=self._steps)
        return json.loads(tensor.numpy().tobytes())

    def copy_from_writer(self, tensors: list[Tensor]) -> None:
        """Overwrites the tensors, each on the run's device, by the writer's."""
        if self.size > 1:
            with told():
                for tensor in tensors:
                    dist.broadcast(tensor, src=0, group=self.gradient_group)

    def check_same(self, tensors: list[Tensor]) -> None:
        """RunError unless the fp32 tensors hold the same bits in every process, as far as sums of their bits tell."""
        if self.size == 1:
            return
        sums = [int(tensor.view(torch.int32).sum(dtype=torch.int64)) for tensor in tensors]
        # A minimum is the maximum of the complement: one exchange finds both ends.
        found = self.agree(*sums, *(~value for value in sums))
        if any(highest != ~lowest for highest, lowest in zip(found[: len(sums)], found[len(sums) :], strict=True)):
            raise RunError("weights that differ between the processes in torchrun. Use one kind of machine, or resume the last checkpoint.")

    def explained(self, error: BaseException) -> BaseException:
        """The error itself where it is the run's first, else a PeerError with the exit code of the first."""
        if self._store is None:
            return error
        record = f"{self.rank} {2 if isinstance(error, InputError) else 1}"
        try:
            first = self._store.compare_set(FAILURE, "", record).decode()
        except RuntimeError:  # the store ended with the process that held it, which had its reason
            return error
        return error if first == record else PeerError(*map(int, first.split()))


@contextmanager
def told() -> Iterator[None]:
    """Turns an error of the communication into one line."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split(". This is")[0].split())
        raise LostPeerError(
            f"a process of the run ended or fell silent in torchrun: {reason}. Run the same command again to resume."
        ) from error


@contextmanager
def joined() -> Iterator[Processes]:
    """Within, this process is one of those that torchrun started; alone where it was started otherwise.

    An error that leaves the context is the run's first, or a PeerError: the others come to an end within seconds of the first.
    """
    if dist.is_initialized():  # by the caller, whose groups are left alone
        yield Processes(dist.get_rank(), dist.get_world_size(), local_rank=int(os.environ.get("LOCAL_RANK", dist.get_rank())))
        return
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Processes()
        return
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=STEP_TIMEOUT))
    except (ValueError, RuntimeError) as error:
        reason = reason_of(error)
        raise InputError(f"processes that do not meet in torchrun: {reason}. Start them by torchrun, or unset WORLD_SIZE.") from error
    dist.init_process_group("gloo", store=dist.PrefixStore("fastcm", store), rank=rank, world_size=size, timeout=STEP_TIMEOUT)
    processes = Processes(rank, size, local_rank=int(os.environ.get("LOCAL_RANK", rank)), store=store)
    try:
        yield processes
        processes.barrier()  # nobody leaves, and takes the store along, before all are done
    except BaseException as error:
        explained = processes.explained(error)
        if explained is error:
            raise
        raise explained from error
    dist.destroy_process_group()
