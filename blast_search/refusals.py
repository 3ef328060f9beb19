"""What models and layers cannot be: refused, or left alone, before anything is spent on them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from blast_search.errors import IncompatibleInputError

# The attributes in which a module keeps its hooks, and what they are called.
_HOOKS = {
    "_forward_hooks": "forward",
    "_forward_pre_hooks": "forward",
    "_backward_hooks": "backward",
    "_backward_pre_hooks": "backward",
    "_state_dict_hooks": "state_dict",
    "_state_dict_pre_hooks": "state_dict",
    "_load_state_dict_pre_hooks": "load_state_dict",
    "_load_state_dict_post_hooks": "load_state_dict",
}


def is_conv1d(module: nn.Module) -> bool:
    """Hugging Face's Conv1D (GPT-2): a linear layer whose weight is stored (n, m)."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def unlike_linear(module: nn.Module) -> str:
    """Why a kind of linear layer may not be replaced: it is not (or not yet) what nn.Linear is.

    "" for one that may be, and for modules of other kinds.
    """
    if not isinstance(module, nn.Linear) and not is_conv1d(module):
        return ""
    if hasattr(module, "parametrizations"):
        return "its weight is parametrized"
    if "forward" in vars(module):  # accelerate's hooks are put there
        return "its forward was replaced on the module itself"
    if isinstance(module, nn.Linear) and type(module).forward is not nn.Linear.forward:
        return f"{type(module).__name__} has a forward of its own"
    weight: Any = module.weight
    if is_lazy(weight):
        return "not initialised yet: run one batch through the model first"
    if not weight.is_floating_point():
        return f"its weight is {str(weight.dtype).removeprefix('torch.')}, not floating-point"
    return ""


def weight_owners(model: nn.Module) -> Mapping[int, Sequence[str]]:
    """By the id of a parameter, the names of the modules that hold it."""
    owners: dict[int, list[str]] = defaultdict(list)
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].append(name)
    return owners


def tied(name: str, module: nn.Module, owners: Mapping[int, Sequence[str]]) -> str:
    """Why a linear layer's weight is not its own, "" where it is; replaced, it would be untied."""
    others = [owner for owner in owners[id(module.weight)] if owner != name]
    return f"weight tied to {', '.join(others)}" if others else ""


def hooked(module: nn.Module) -> str:
    """Which hooks a module has, "" if none; what replaces it would not have them."""
    kinds = {kind: None for key, kind in _HOOKS.items() if getattr(module, key, None)}
    return f"has {' and '.join(kinds)} hooks" if kinds else ""


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite, also of the types that PyTorch cannot ask."""
    small = tensor.is_floating_point() and tensor.element_size() < 2
    return bool((tensor.float() if small else tensor).isfinite().all())


def check_model(model: nn.Module) -> None:
    """Refuse a model that could not be searched or saved.

    Raises:
        IncompatibleInputError: it is compiled or scripted, some of its state is no tensor, or a
            parameter is not finite.
    """
    refuse_wrapped(model)
    state_of(model)
    for name, parameter in model.named_parameters():
        if not parameter.is_meta and not is_lazy(parameter) and not is_finite(parameter):
            layer, _, kind = name.rpartition(".")
            raise IncompatibleInputError(
                f"{f'layer {layer}: its' if layer else 'the'} {kind} holds NaN or infinity. "
                "Repair the checkpoint first."
            )


def refuse_wrapped(model: nn.Module) -> None:
    """Refuse what torch.compile and TorchScript return: no layer in it can be replaced.

    Raises:
        IncompatibleInputError: it is one of them.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise IncompatibleInputError(
            "the model is a torch.jit.ScriptModule, whose layers cannot be replaced. Give the "
            "model that was scripted or traced."
        )
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise IncompatibleInputError(
            "the model was wrapped by torch.compile, expected the model itself. Give that, and "
            "compile what comes out."
        )


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's state_dict, all of which a saved model holds.

    Raises:
        IncompatibleInputError: some of it is no tensor (a quantised module's, a get_extra_state),
            or a sparse one.
    """
    state: dict[str, Any] = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            for path, module in model.named_modules():
                if name.startswith(f"{path}.") and _is_quantised(module):
                    raise IncompatibleInputError(
                        f"{path} is a quantised {type(module).__name__}, and such modules can "
                        "neither be searched nor saved. Give the model before quantisation."
                    )
            raise IncompatibleInputError(
                f"{name} is a {type(value).__name__}, and models are saved as tensors only. Have "
                "get_extra_state return a tensor, or keep it out of the model."
            )
        if value.layout is not torch.strided:
            raise IncompatibleInputError(
                f"{name} is a tensor of layout {value.layout}, and models are saved as dense "
                "tensors only. Register it with persistent=False, or keep it dense."
            )
    return state


def _is_quantised(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.ao.nn.")
