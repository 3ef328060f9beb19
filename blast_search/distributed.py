"""Retraining by several processes, one per device, which torchrun started.

    torchrun --standalone --nproc-per-node 2 -m blast_search.cli retrain DIR

Every process holds the model and its teacher, takes every N-th training batch, and steps by the
mean of all gradients: one step sees N batches, and the models stay equal.  DistributedDataParallel
does the same for a model that it wraps; a task's loss is handed the model itself, and may call
whatever it has.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import islice

import torch
from torch import Tensor, distributed, nn

from blast_search.batches import Batch
from blast_search.errors import UsageError
from blast_search.settings import pick_device

WAIT = timedelta(hours=6)  # the others wait while the first one evaluates


@dataclass(frozen=True)
class Team:
    """The processes that train one model together; by default this one alone."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process evaluates, saves and tells."""
        return self.rank == 0

    def share(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """This process's part of the training batches: every `size`-th one."""
        return islice(batches, self.rank, None, self.size)

    def average(self, loss: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
        """The mean loss of all processes; gradients become their means, too.

        A parameter that a batch does not reach has a gradient of zero there.
        """
        loss = loss.detach()
        if self.size == 1:
            return loss
        tensors = [loss.clone()]
        for parameter in parameters:
            grad = parameter.grad
            parameter.grad = torch.zeros_like(parameter) if grad is None else grad
            parameter.grad = parameter.grad.contiguous()
            tensors.append(parameter.grad)
        for work in [distributed.all_reduce(t, async_op=True) for t in tensors]:
            assert work
            work.wait()
        for tensor in tensors:
            tensor /= self.size
        return tensors[0]

    def told(self, ask: Callable[[], float]) -> float:
        """What the first process finds; the others wait for it, so that all decide alike."""
        if self.size == 1:
            return ask()
        device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
        value = torch.tensor(ask() if self.first else 0.0, dtype=torch.float64, device=device)
        distributed.broadcast(value, 0)
        return float(value)


ALONE = Team()


@contextmanager
def joined() -> Iterator[Team]:
    """This process among those that torchrun started with it; `ALONE` where it did not.

    Raises:
        UsageError: more processes than devices on this machine.
    """
    if not (distributed.is_available() and distributed.is_torchelastic_launched()):
        yield ALONE
        return
    on_gpu = pick_device("auto").type == "cuda"
    if on_gpu:
        local, devices = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= devices:
            raise UsageError(
                f"torchrun started {os.environ['LOCAL_WORLD_SIZE']} processes here, and there are "
                f"{devices} GPUs. Give --nproc-per-node {devices}."
            )
        torch.cuda.set_device(local)
    distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=WAIT)
    yield Team(distributed.get_rank(), distributed.get_world_size())
    # Not after an error: the others may wait for this process, and torchrun ends them.
    distributed.destroy_process_group()
