"""Tasks, and what is measured of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from blast_search.batches import Batch, anywhere, call_model, evaluating, seeded, to_device
from blast_search.errors import IncompatibleInputError, UsageError
from blast_search.fused import unfused
from blast_search.layers import Workload
from blast_search.plan import Choices
from blast_search.space import DENSE, LayerSpec


@runtime_checkable
class Task(Protocol):
    """A model, the data to judge and to retrain it, and the batch to be fast for.

    Optional attributes: `train_steps` (int) and `learning_rate` (float), the default retraining
    recipe; `make_workload(batch_size, length)`, a batch for `--workload 8x128`.
    """

    name: str
    metric: tuple[str, bool]  # name, higher is better

    def model(self) -> nn.Module:
        """A fresh dense model."""
        ...

    def workload(self) -> Any:
        """One batch of the shape to be fast for, or {name: (batch, weight)} for several."""
        ...

    def calibration(self) -> Iterable[Batch]:
        """Batches without labels; never used for evaluation."""
        ...

    def evaluate(self, model: nn.Module) -> float:
        """The metric, on data never used for calibration or training."""
        ...

    def train_batches(self, seed: int) -> Iterator[Batch]:
        """Training batches; where they come to an end, they are asked for again."""
        ...

    def loss(self, model: nn.Module, batch: Batch, teacher: nn.Module) -> Tensor:
        """A scalar to minimise; `teacher` is the dense model."""
        ...


def parse_workload(spec: str) -> list[tuple[str, int, int, float]]:
    """ "8x128" or "prefill:1x2048,decode:8x1@0.7" -> (name, batch size, length, weight)."""
    parsed: list[tuple[str, int, int, float]] = []
    for index, part in enumerate(spec.split(",")):
        head, _, weight = part.partition("@")
        name, _, size = head.rpartition(":")
        batch, _, length = size.strip().partition("x")
        try:
            item = (name.strip() or f"w{index}", int(batch), int(length), float(weight or 1))
        except ValueError:
            item = ("", 0, 0, 0.0)
        if item[1] < 1 or item[2] < 1 or not 0 < item[3] < float("inf"):
            raise UsageError(
                f"workload '{part}' is not understood, expected [NAME:]BATCHxLENGTH[@WEIGHT], "
                "for instance 8x128 or prefill:1x2048,decode:8x1@0.7."
            )
        if item[0] in {name for name, *_ in parsed}:
            raise UsageError(
                f"workload '{spec}' has two parts named {item[0]}: give each its own name, "
                "for instance prefill:1x2048,decode:8x1@0.7."
            )
        parsed.append(item)
    return parsed


def workloads_of(task: Task, spec: str | None = None) -> list[Workload]:
    """The workloads of a task, or those of a `--workload` specification.

    Raises:
        UsageError: a specification that is not understood, or a task that cannot follow it.
        IncompatibleInputError: a named workload of the task is no (batch, weight), or its weight
            is not above 0 and finite.
    """
    if spec:
        make = getattr(task, "make_workload", None)
        if not callable(make):
            raise UsageError(
                f"task {task.name} has no make_workload(batch_size, length), so --workload "
                "cannot be used with it. Leave the option out, or add the method."
            )
        return [Workload(n, make(b, t), w) for n, b, t, w in parse_workload(spec)]
    given = task.workload()
    if isinstance(given, Mapping) and given and all(isinstance(v, tuple) for v in given.values()):
        return [_named_workload(task, str(name), pair) for name, pair in given.items()]
    return [Workload("default", given)]


def _named_workload(task: Task, name: str, pair: tuple[Any, ...]) -> Workload:
    """One of several workloads, checked."""
    where = f"task {task.name}: workload() gave for '{name}'"
    if len(pair) != 2:
        raise IncompatibleInputError(
            f"{where} a tuple of {len(pair)}, expected (batch, weight). A batch of several "
            "inputs is a tuple of its own: ((x, y), 1.0)."
        )
    batch, weight = pair
    number = isinstance(weight, int | float | np.number) and not isinstance(weight, bool)
    if not number or not 0 < weight < float("inf"):
        got = weight if number else f"a {type(weight).__name__}"
        raise IncompatibleInputError(
            f"{where} the weight {got}, expected a finite number above 0, as in (batch, 1.0)."
        )
    return Workload(name, batch, float(weight))


def describe_workloads(workloads: Iterable[Workload]) -> list[dict[str, Any]]:
    """Shapes of the workloads as JSON values."""

    def shape(value: Any) -> Any:
        if isinstance(value, Tensor):
            return list(value.shape)
        if isinstance(value, Mapping):
            return {str(key): shape(item) for key, item in value.items()}
        if isinstance(value, tuple | list):
            return [shape(item) for item in value]
        return str(type(value).__name__)

    return [{"name": w.name, "weight": w.weight, "shape": shape(w.batch)} for w in workloads]


def evaluate(task: Task, model: nn.Module) -> float:
    """The task's metric of a model in eval mode, wherever the model and the task's data are.

    Raises:
        IncompatibleInputError: the metric is not a finite number.
    """
    with seeded(), evaluating(model), torch.no_grad(), anywhere(model):
        given: Any = task.evaluate(model)
    try:
        value = float(given)
    except (TypeError, ValueError, RuntimeError) as error:  # the last: a tensor of several
        raise IncompatibleInputError(
            f"task {task.name}: evaluate() returned a {type(given).__name__}, expected the "
            "metric, one number. Return that."
        ) from error
    if value != value or value in (float("inf"), float("-inf")):
        raise IncompatibleInputError(f"task {task.name}: the metric is {value}, not finite.")
    return value


def worse_by(task: Task, value: float, dense: float) -> float:
    """By how much a metric fell short of the dense model's, in its own unit (negative: better)."""
    return dense - value if task.metric[1] else value - dense


@torch.no_grad()
def count_macs(model: nn.Module, workloads: Iterable[Workload]) -> float:
    """Multiply-adds of one call of the dense model, weighted over workloads.

    PyTorch's counter knows matrix products and attention (that of CPUs it is taught here), but not
    the fused form of whole transformer layers in eval mode, which is off.  1 multiply-add = 1 MAC
    = 2 FLOPs.
    """
    total = 0.0
    for workload in workloads:
        batch = to_device(workload.batch, model)
        try:  # fused attention takes no memory for every pair of tokens
            flops = _flops(model, batch, plain=False)
        except AssertionError:  # older versions cannot count keys that several heads share
            flops = _flops(model, batch, plain=True)
        total += flops / 2 * workload.weight
    return total


def _flops(model: nn.Module, batch: Batch, plain: bool) -> int:
    """What PyTorch counts in one call; with plain attention in place of fused kinds, or not."""
    # Imports triton where installed.
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def on_cpu(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(q, k, v))  # type: ignore[no-untyped-call]

    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    counter = FlopCounterMode(display=False, custom_mapping={fused: on_cpu})
    math = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    # oneDNN runs a whole LSTM as one operator, which no counter knows.  (`mkldnn.flags` would set
    # TF32, too, with a warning.)
    onednn = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        with math if plain else nullcontext(), unfused(), counter:
            call_model(model, batch)
    finally:
        torch._C._set_mkldnn_enabled(onednn)
    return int(counter.get_total_flops())


def size_ratios(
    layers: Iterable[LayerSpec], choices: Choices, model_params: int, model_macs: float
) -> tuple[float, float]:
    """(MACs ratio, parameters ratio) of the whole model under a plan, exact by formula."""
    params, macs = float(model_params), model_macs
    for layer in layers:
        choice = choices.get(layer.name, DENSE)
        params += layer.params(choice) - layer.params(DENSE)
        macs += layer.macs(choice) - layer.macs(DENSE)
    return macs / max(model_macs, 1.0), params / max(model_params, 1)


def count_params(model: nn.Module) -> int:
    return cast(int, sum(p.numel() for p in model.parameters()))
