"""Recover quality: distillation from the dense model.

Factors, norms and biases train; embeddings, heads and dense weights keep their values (as in the
BLAST paper's recipe).  AdamW, linear warm-up, cosine decay, gradient norm clipped at 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from blast_search.apply import duplicate
from blast_search.batches import Batch, anywhere, evaluating, to_device
from blast_search.distributed import ALONE, Team
from blast_search.errors import IncompatibleInputError, UsageError, in_one_line
from blast_search.evaluate import Task
from blast_search.fused import differentiable, unfused
from blast_search.matrix import BlastLinear
from blast_search.progress import SILENT, Reporter
from blast_search.structured import StructuredLinear

DEFAULT_STEPS = 300
DEFAULT_LEARNING_RATE = 1e-3
WARMUP = 0.05
WITHOUT = "Correct that, or search without retraining: --retrain-steps 0."


def trainable_parameters(model: nn.Module) -> list[nn.Parameter]:
    """BLAST factors, all biases (of PyTorch's attention and RNNs, too: in_proj_bias, bias_ih_l0),
    and all parameters of normalisation layers."""
    chosen: dict[int, nn.Parameter] = {}
    for module in model.modules():
        norm = "norm" in type(module).__name__.lower()
        for name, parameter in module.named_parameters(recurse=False):
            factors = isinstance(module, BlastLinear | StructuredLinear)
            bias = name == "bias" or name.startswith("bias_") or name.endswith("_bias")
            if (factors or norm or bias) and parameter.is_floating_point():
                chosen[id(parameter)] = parameter
    return list(chosen.values())


def autocast_dtype(device: torch.device, teacher: nn.Module) -> torch.dtype | None:
    """bf16 where the device multiplies it faster than float32, else None."""
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else None
    # A float16 teacher's norms refuse what bf16 autocast hands them on a CPU.
    if any(p.dtype == torch.float16 for p in teacher.parameters()):
        return None
    # Without AMX, bf16 products on a CPU are emulated and slower than float32.
    amx = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return torch.bfloat16 if callable(amx) and amx() else None


def retrain(
    task: Task,
    model: nn.Module,
    teacher: nn.Module,
    steps: int | None = None,
    seed: int = 0,
    learning_rate: float | None = None,
    report: Reporter = SILENT,
    name: str = "retrain",
    on_step: Callable[[int, float], None] = lambda step, loss: None,
    team: Team = ALONE,
) -> list[float]:
    """Train the model in place against the teacher; returns the loss of every step.

    Args:
        steps, learning_rate: default to the task's recipe.
        team: the processes that train it together, each called with the same arguments.
        seed: of the batches, and of PyTorch's generator, for losses that draw; equal seeds give
            equal batches and draws to every contender, and after a resume.

    Raises:
        UsageError: fewer than 0 steps.
        IncompatibleInputError: the loss is no scalar that can be differentiated, or stays without
            a finite value, or there are no batches.
    """
    steps = _steps(task, steps)
    rate = rate_of(task) if learning_rate is None else learning_rate
    if steps < 0:
        raise UsageError(f"retraining steps are {steps}, expected 0 or more.")
    parameters = trainable_parameters(model)
    if not parameters or steps == 0:
        return []
    torch.manual_seed(seed + team.rank)
    losses: list[float] = []
    device = parameters[0].device
    dtype, batches = autocast_dtype(device, teacher), team.share(_endless(task, seed))
    with _training(model, teacher, parameters), anywhere(model, teacher):
        optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: _rate(s, steps))
        with report.stage(name, steps) as advance:
            for step in range(steps):
                batch = to_device(next(batches), model)
                loss = _loss(task, model, batch, teacher, dtype)
                losses.append(_descend(loss, optimizer, parameters, team))
                if step == 0:
                    _check_reached(task, model, report)
                schedule.step()
                on_step(step, losses[-1])
                advance()
    if not any(math.isfinite(loss) for loss in losses[-10:]):
        raise IncompatibleInputError(
            f"task {task.name}: the training loss is not finite. Lower its learning_rate "
            f"(now {rate:g})."
        )
    return losses


def _check_reached(task: Task, model: nn.Module, report: Reporter) -> None:
    """Say, or refuse, that a first step's gradient does not reach factors that should learn."""
    layers = [m for m in model.modules() if isinstance(m, BlastLinear | StructuredLinear)]
    still = [m for m in layers if all(p.grad is None for p in m.parameters())]
    if not still or all(p.grad is None for p in model.parameters()):  # a step that was skipped
        return
    told = (
        f"task {task.name}: the gradient of the first batch's loss reaches "
        f"{len(layers) - len(still)} of {len(layers)} replaced layers. Those that the batch does "
        "not call have none; a forward under torch.no_grad(), or checkpoints with "
        "use_reentrant=True, keep it from others."
    )
    if len(still) == len(layers):
        raise IncompatibleInputError(told)
    report.say(told)


def _steps(task: Task, steps: int | None) -> int:
    """Retraining steps as asked, or the task's recipe."""
    return int(getattr(task, "train_steps", DEFAULT_STEPS)) if steps is None else steps


def rate_of(task: Task) -> float:
    return float(getattr(task, "learning_rate", DEFAULT_LEARNING_RATE))


def _loss(
    task: Task, model: nn.Module, batch: Batch, teacher: nn.Module, dtype: torch.dtype | None
) -> Tensor:
    """The task's loss, within autocast to `dtype`, checked to be one that can be descended."""
    device = next(model.parameters()).device.type
    cast: Any = torch.autocast(device, dtype) if dtype else nullcontext()
    with torch.enable_grad(), cast:
        loss: Any = task.loss(model, batch, teacher)
    if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
        return loss
    got = f"a {type(loss).__name__}"
    if isinstance(loss, Tensor):
        got = f"a tensor of shape {list(loss.shape)}"
        got += "" if loss.requires_grad else " without a gradient"
    raise IncompatibleInputError(
        f"task {task.name}: loss() returned {got}, expected a scalar tensor that depends on the "
        "model's parameters. Return it as it is (no float(), item() or detach()), and call the "
        "model outside of torch.no_grad()."
    )


def tried_loss(task: Task, model: nn.Module, steps: int | None = None, seed: int = 0) -> None:
    """Compute the task's loss of one training batch, to see before a search whether it can be.

    Of a twin of the dense model, which has parameters and buffers of its own (float32 ones in the
    same memory), with the model as its teacher.  No gradient is computed.

    Args:
        steps, seed: as for `retrain`; of 0 steps there is nothing to try.

    Raises:
        IncompatibleInputError: loss or train_batches fails, or the loss cannot be descended.
    """
    if not _steps(task, steps):
        return
    device, what = next(model.parameters()).device, "train_batches()"
    devices = [device] if device.type == "cuda" else []
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with torch.random.fork_rng(devices), unfused():
            twin = duplicate(model, {id(p): _learning(p) for p in model.parameters()})
            both = (twin, model)
            with evaluating(*both), differentiable(*both), anywhere(*both):
                torch.manual_seed(seed)
                batch = to_device(next(_endless(task, seed)), twin)
                what = "loss() of the first training batch"
                _loss(task, twin, batch, model, autocast_dtype(device, model))
    except torch.OutOfMemoryError:
        return  # of the dense model; a smaller one may well fit
    except IncompatibleInputError as error:
        raise IncompatibleInputError(f"{error} {WITHOUT}") from error
    except Exception as error:
        raise IncompatibleInputError(
            f"task {task.name}: {what} failed: {in_one_line(error)}. Expected training batches, "
            f"and of each a scalar. {WITHOUT}"
        ) from error
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _learning(parameter: nn.Parameter) -> nn.Parameter:
    """A parameter as retraining has it: in float32, with gradients; of its own all the same."""
    if not parameter.is_floating_point():
        return parameter
    half = parameter.dtype in (torch.float16, torch.bfloat16)
    value = parameter.detach()
    return nn.Parameter(value.float() if half else value)


def _endless(task: Task, seed: int) -> Iterator[Batch]:
    """The task's training batches; one epoch after another where they come to an end."""
    epoch, count = seed, 0
    while True:
        before = count
        for batch in task.train_batches(epoch):
            count += 1
            yield batch
        if count == before:
            raise IncompatibleInputError(
                f"task {task.name}: train_batches({epoch}) gave no batch, expected some."
            )
        epoch += 1


@contextmanager
def _training(
    model: nn.Module, teacher: nn.Module, parameters: list[nn.Parameter]
) -> Iterator[None]:
    """Only `parameters` learn, in float32; flags, modes and dtypes come back afterwards.

    Half precision cannot hold an update: a step of 1e-4 vanishes in a bfloat16 factor of 1.
    """
    flags = [(p, p.requires_grad) for p in (*model.parameters(), *teacher.parameters())]
    dtypes = [(t, t.dtype) for t in _floats(model)]
    try:
        for tensor, _ in dtypes:
            tensor.data = tensor.data.to(torch.promote_types(tensor.dtype, torch.float32))
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        # In eval mode, as dropout would add noise to a distillation target; the teacher without
        # gradients computes as the model does with them.
        with evaluating(model, teacher), differentiable(model, teacher), unfused():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
        for tensor, dtype in dtypes:
            tensor.data = tensor.data.to(dtype)


def _floats(model: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers of the model that hold floating-point numbers."""
    return (t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point())


def _descend(
    loss: Tensor, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter], team: Team
) -> float:
    """One step; a loss or gradient that is not finite is skipped, not applied."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    loss = team.average(loss, parameters)
    norm = nn.utils.clip_grad_norm_(parameters, 1.0)
    if not bool(norm.isfinite() & loss.isfinite().all()):  # the step's one wait for the device
        optimizer.zero_grad(set_to_none=True)
    optimizer.step()  # leaves parameters without a gradient as they are
    return float(loss)


def _rate(step: int, steps: int) -> float:
    warmup = max(1, int(steps * WARMUP))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
