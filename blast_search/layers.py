"""Which weights of a model may be replaced, and the swapping of modules in place."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from blast_search.batches import FORMS, Batch, tried
from blast_search.errors import IncompatibleInputError
from blast_search.outputs import output_tensors
from blast_search.refusals import (
    check_model,
    hooked,
    is_conv1d,
    tied,
    unlike_linear,
    weight_owners,
)
from blast_search.space import Call, LayerSpec, SearchSpace


@dataclass(frozen=True)
class Workload:
    """One batch to be fast for; `weight` is its share where there are several."""

    name: str
    batch: Batch
    weight: float = 1.0


def is_linear(module: nn.Module) -> bool:
    """nn.Linear (also a subclass that keeps its forward), or Hugging Face's Conv1D."""
    return (isinstance(module, nn.Linear) or is_conv1d(module)) and not unlike_linear(module)


def dense_weight(module: nn.Module) -> Tensor:
    """The (m, n) weight of a linear layer, detached."""
    weight = module.weight
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(module).__name__} has no weight tensor.")
    return weight.detach().T if is_conv1d(module) else weight.detach()


def find_layers(
    model: nn.Module,
    workloads: Sequence[Workload] = (),
    space: SearchSpace | None = None,
) -> list[LayerSpec]:
    """The layers that may be replaced, in the model's order.

    Without workloads the model is not run: layers count as called once with one token, and an
    output head can be told only by Hugging Face's `get_output_embeddings`.
    """
    return inventory(model, workloads, space or SearchSpace())[0]


def inventory(
    model: nn.Module, workloads: Sequence[Workload], space: SearchSpace
) -> tuple[list[LayerSpec], dict[str, str]]:
    """`find_layers`, and for every other linear layer the reason why it stays dense.

    Raises:
        IncompatibleInputError: the model cannot be called with a workload, a parameter is not
            finite, it is compiled or scripted, or could not be saved.
    """
    check_model(model)  # what could not be saved is refused before a search, not after it
    names: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[module].append(name)
    owners = weight_owners(model)
    linears = {module: paths for module, paths in names.items() if is_linear(module)}
    unlike = {module: why for module in names if (why := unlike_linear(module))}
    calls, heads = trace(model, list(linears), workloads)
    # Their weights are read by a function that does not call them.
    attention = {m.out_proj for m in names if isinstance(m, nn.MultiheadAttention)}
    layers, skipped = [], {}
    for module, (name, *aliases) in names.items():
        if module in unlike:
            skipped[name] = unlike[module]
        if module not in linears:
            continue
        if not name:
            reason = "is the whole model"
        elif not space.selects(name):
            reason = "left out by include/exclude"
        elif why := tied(name, module, owners):
            reason = why
        elif module in attention:
            reason = "inside nn.MultiheadAttention"
        elif module in heads and not space.output_head:
            reason = "output head"
        elif workloads and not calls[module]:
            reason = "not called as a module by the workload"
        else:
            reason = hooked(module)
        if reason:
            skipped[name] = reason
            continue
        m, n = dense_weight(module).shape
        layers.append(
            LayerSpec(
                name, n, m, module.bias is not None,
                calls[module] if workloads else (Call(1),), tuple(aliases),
                space.tie(name, (m, n)),
            )
        )  # fmt: skip
    unreached = _unreached(model, layers, workloads)
    return [layer for layer in layers if layer.name not in unreached], skipped | unreached


def _unreached(
    model: nn.Module, layers: Sequence[LayerSpec], workloads: Sequence[Workload]
) -> dict[str, str]:
    """The layers that a model would still call, or no longer, were they replaced; and why.

    A model that calls its layers through a list of its own never sees a replacement, which would
    look as if it took no time.  So each workload is run once more, with stand-ins in place that
    compute the same: a change of values may change what is called.
    """
    if not layers or not workloads:
        return {}
    dense = get_modules(model, layers)
    stand_ins = {name: _StandIn(module) for name, module in dense.items()}
    try:
        with swapped(model, layers, stand_ins):
            calls, _ = trace(model, [*dense.values(), *stand_ins.values()], workloads)
    except IncompatibleInputError as error:
        cause = error.__cause__
        raise IncompatibleInputError(
            f"the model cannot be called once its layers are replaced: {type(cause).__name__}: "
            f"{cause}. Exclude the layers that its forward reads."
        ) from error
    reasons = {}
    for name, module in dense.items():
        if calls[module]:
            reasons[name] = "called by another reference than its name"
        elif not calls[stand_ins[name]]:
            reasons[name] = "not called where it is replaced"
        elif stand_ins[name].was_read:
            # A BLAST layer builds it at each read: slow where only its dtype is wanted (T5), no
            # gain where it is multiplied with, and in neither case part of the layer's timing.  To
            # keep it would take a dense layer's memory, and miss changes made through `.data`.
            reasons[name] = "its weight is read by the model's forward"
    return reasons


def trace(
    model: nn.Module, linears: Sequence[nn.Module], workloads: Sequence[Workload]
) -> tuple[dict[nn.Module, tuple[Call, ...]], set[nn.Module]]:
    """Run each workload once: the calls of every linear layer, and the output heads."""
    calls: dict[nn.Module, list[Call]] = defaultdict(list)
    outputs: dict[nn.Module, StorageWeakRef] = {}
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    heads = {head} if isinstance(head, nn.Module) else set()
    weight, name = 1.0, ""

    def record(module: nn.Module, _args: Any, output: Any) -> None:
        calls[module].append(Call(output.numel() // output.shape[-1], weight, name))
        # The data may go, which of all layers would take too much; the address is not reused.
        outputs[module] = StorageWeakRef(output.untyped_storage())  # type: ignore[no-untyped-call]

    hooks = [module.register_forward_hook(record) for module in linears]
    try:
        for workload in workloads:
            weight, name = workload.weight, workload.name
            what = f"workload '{workload.name}'"
            expected = f"{FORMS}: check the task's workload()."
            output = tried(model, workload.batch, what, expected)
            # `_cdata` tells storages apart also where they have no data (the "meta" device).
            results = {t.untyped_storage()._cdata for t in output_tensors(output).values()}
            heads |= {m for m, storage in outputs.items() if storage.cdata in results}
            outputs.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return {module: tuple(calls[module]) for module in linears}, heads


def get_modules(model: nn.Module, layers: Sequence[LayerSpec]) -> dict[str, nn.Module]:
    """The current module of every layer, by layer name."""
    return {layer.name: model.get_submodule(layer.name) for layer in layers}


def set_modules(
    model: nn.Module, layers: Sequence[LayerSpec], modules: Mapping[str, nn.Module]
) -> None:
    """Put modules in the places of layers, at every path of a shared layer."""
    for layer in layers:
        if layer.name in modules:
            for path in (layer.name, *layer.aliases):
                parent, _, child = path.rpartition(".")
                setattr(model.get_submodule(parent), child, modules[layer.name])
    _sync_fast_paths(model)


def _sync_fast_paths(model: nn.Module) -> None:
    """Keep PyTorch's fused transformer path away from replaced layers.

    nn.TransformerEncoderLayer hands `linear1.weight` to one fused kernel in eval mode, which
    would bypass a replacement; it is told that its activation has no fused kernel.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            state = module.__dict__.setdefault("_blast_fused", module.activation_relu_or_gelu)
            plain = all(isinstance(m, nn.Linear) for m in (module.linear1, module.linear2))
            module.activation_relu_or_gelu = state if plain else 0
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            nested = module.__dict__.setdefault("_blast_nested", module.use_nested_tensor)
            fused = [getattr(layer, "activation_relu_or_gelu", 0) for layer in module.layers]
            module.use_nested_tensor = bool(nested and all(fused))


@contextmanager
def swapped(
    model: nn.Module, layers: Sequence[LayerSpec], modules: Mapping[str, nn.Module]
) -> Iterator[nn.Module]:
    """The model with some layers replaced, restored on leaving."""
    before = get_modules(model, layers)
    set_modules(model, layers, modules)
    try:
        yield model
    finally:
        set_modules(model, layers, before)


class Stub(nn.Module):
    """Returns zeros of a linear layer's output shape at almost no cost.

    A model whose searched layers are stubs takes the time of everything *outside* them.  Models
    also read attributes of their layers (T5 the dtype of a weight), so a stub has those of the
    layer it stands for; its parameters are the same objects, not copies.
    """

    in_features: int
    out_features: int

    def __init__(self, dense: nn.Module, zeros: dict[Any, Tensor]) -> None:
        super().__init__()
        self.out_features, self.in_features = dense_weight(dense).shape
        for name in ("weight", "bias", "nf", "nx"):  # the last two: Hugging Face's Conv1D
            if hasattr(dense, name):
                setattr(self, name, getattr(dense, name))
        self._zeros = zeros

    def forward(self, input: Tensor) -> Tensor:
        x, shape = input, (*input.shape[:-1], self.out_features)
        key = (shape, x.dtype, x.device)
        if key not in self._zeros:
            self._zeros[key] = x.new_zeros(shape)
        return self._zeros[key]


class _StandIn(Stub):
    """Computes what a dense layer does, but the dense layer's hooks do not notice.

    It does notice that others read its weight (`was_read`).
    """

    def __init__(self, dense: nn.Module) -> None:
        super().__init__(dense, {})
        self._compute = dense.forward
        self.was_read = False

    def __getattr__(self, name: str) -> Any:  # parameters are no ordinary attributes
        if name == "weight":
            self.was_read = True
        return super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._compute(*args, **kwargs)  # type: ignore[no-any-return]


def stubs(dense: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """A stub for each dense layer; they share their zeros, which would otherwise be gigabytes."""
    zeros: dict[Any, Tensor] = {}
    return {name: Stub(module, zeros) for name, module in dense.items()}
