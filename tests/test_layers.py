"""What is found, what is left alone and why, and that swapping leaves no trace."""

from __future__ import annotations

from types import MethodType

import pytest
import torch
from torch import nn
from toy import WIDTH, NanWeights, Net, ToyTask

from blast_search import BlastLinear, apply, find_layers
from blast_search.errors import IncompatibleInputError
from blast_search.layers import Stub, Workload, get_modules, inventory, stubs, swapped
from blast_search.plan import LayerPlan, Plan
from blast_search.space import Call, SearchSpace


def found(model: nn.Module, batch, space: SearchSpace | None = None):
    return inventory(model.eval(), [Workload("w", batch)], space or SearchSpace())


def test_layers_heads_and_tokens():
    task = ToyTask()
    layers, skipped = found(task.model(), task.workload())
    assert [layer.name for layer in layers][:2] == ["blocks.0.fc1", "blocks.0.fc2"]
    assert all(layer.calls == (Call(16 * 16, 1.0, "w"),) for layer in layers)
    assert skipped == {"head": "output head"}
    assert layers[0].shape == (4 * WIDTH, WIDTH)
    assert layers[0].type_name == "blocks.fc1"


def test_patterns_and_heads_can_be_searched():
    task = ToyTask()
    space = SearchSpace(include=("*.fc2", "head"), exclude=("blocks.1.*",), output_head=True)
    layers, skipped = found(task.model(), task.workload(), space)
    assert [layer.name for layer in layers] == ["blocks.0.fc2", "blocks.2.fc2", "head"]
    assert skipped["blocks.1.fc2"] == "left out by include/exclude"


def test_a_final_linear_is_a_head_even_behind_a_view():
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 6)

        def forward(self, x):
            return self.b(self.a(x)).view(-1, 2)

    layers, skipped = found(Viewed(), torch.randn(3, 8))
    assert [layer.name for layer in layers] == ["a"]
    assert skipped == {"b": "output head"}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.shared = nn.Linear(8, 8)
        self.again = self.shared
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)
        self.right.weight = self.left.weight
        self.unused = nn.Linear(8, 8)
        self.out = nn.Linear(8, 20, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        x = self.again(torch.relu(self.shared(self.embed(ids))))
        return self.out(self.right(torch.relu(self.left(x)))).softmax(-1)


def test_tied_shared_and_unused_layers():
    model = Tied()
    layers, skipped = found(model, torch.zeros(2, 5, dtype=torch.long))
    assert [(layer.name, layer.aliases) for layer in layers] == [("shared", ("again",))]
    assert layers[0].calls == (Call(10, 1.0, "w"), Call(10, 1.0, "w"))  # one module, called twice
    assert skipped["left"] == "weight tied to right"
    assert skipped["out"] == "weight tied to embed"
    assert skipped["unused"] == "not called as a module by the workload"
    with swapped(model, layers, {"shared": Stub(model.shared, {})}):
        assert model.shared is model.again
        assert isinstance(model.again, Stub)
    assert model.shared is model.again
    assert isinstance(model.again, nn.Linear)


class Listed(nn.Module):
    """Calls two of its layers through a list that PyTorch does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.order = [self.a, self.b]

    def forward(self, x):
        for layer in self.order:
            x = layer(x)
        return self.d(x) + self.a(self.c(x)) + 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_layers_called_by_another_reference_are_left_alone(device: str):
    with torch.device(device):
        model, x = Listed().train(), torch.randn(3, 8)
    before = dict(model.named_modules())
    layers, skipped = inventory(model, [Workload("w", x)], SearchSpace())
    assert [layer.name for layer in layers] == ["c", "d"]
    # Replacing `a` would change one of its two calls.
    assert skipped == dict.fromkeys("ab", "called by another reference than its name")
    assert dict(model.named_modules()) == before
    assert all(m.training and not m._forward_hooks for m in model.modules())


def test_what_is_called_does_not_hang_on_the_values_of_replaced_layers():
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(8, 8)
            self.experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

        def forward(self, x):
            return self.experts[int(bool(self.gate(x).abs().sum() > 0))](x) + 0

    layers, skipped = found(Routed(), torch.randn(3, 8))
    assert [layer.name for layer in layers] == ["gate", "experts.1"]
    assert skipped == {"experts.0": "not called as a module by the workload"}


def test_layers_that_are_called_once_for_all_are_left_alone():
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.kept = nn.Linear(8, 8), nn.Linear(8, 8), None

        def forward(self, x):
            self.kept = self.a(x) if self.kept is None else self.kept
            return self.b(x) + self.kept

    layers, skipped = found(Kept(), torch.randn(3, 8))
    assert [layer.name for layer in layers] == ["b"]
    assert skipped == {"a": "not called where it is replaced"}


def test_a_model_that_needs_its_own_layers_is_refused():
    class Marked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.a.scale = 2.0

        def forward(self, x):
            return self.b(self.a(x)) * self.a.scale

    x = torch.randn(3, 8)
    with pytest.raises(IncompatibleInputError, match=r"layers are replaced: .*'scale'.*Exclude"):
        found(Marked(), x)
    assert [ly.name for ly in found(Marked(), x, SearchSpace(exclude=("a",)))[0]] == ["b"]


def test_other_kinds_of_linear_layers_are_left_alone():
    class Scaled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model = nn.Sequential(nn.Linear(8, 8), Scaled(8, 8), nn.Linear(8, 8), nn.ReLU())
    nn.utils.parametrizations.weight_norm(model[2])
    layers, skipped = found(model, torch.randn(3, 8))
    assert [layer.name for layer in layers] == ["0"]
    assert skipped == {"1": "Scaled has a forward of its own", "2": "its weight is parametrized"}
    assert [layer.name for layer in find_layers(model)] == ["0"]


def test_layers_that_compute_something_else_on_the_module_itself_are_left_alone():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)), nn.ReLU())
    plain = model[1].forward
    model[1].forward = lambda x: 2 * plain(x)  # as accelerate's hooks do
    model[2].forward = MethodType(nn.Linear.forward, model[2])
    reason = "its forward was replaced on the module itself"
    layers, skipped = found(model, torch.randn(3, 8))
    assert [layer.name for layer in layers] == ["0", "3"]
    assert skipped == dict.fromkeys("12", reason)
    plan = Plan(model={}, layers={"1": LayerPlan("blast", 2, 2, 8, 8)})
    with pytest.raises(IncompatibleInputError, match=f"layer 1 .* linear layer: {reason}"):
        apply(model, plan)


def test_weights_that_are_not_floating_point_are_left_alone():
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.turn = nn.Linear(8, 8), nn.Linear(8, 8, dtype=torch.complex64)

        def forward(self, x):
            return self.turn(self.a(x).cfloat()).real

    layers, skipped = found(Spectral(), torch.randn(3, 8))
    assert [layer.name for layer in layers] == ["a"]
    assert skipped == {"turn": "its weight is complex64, not floating-point"}


def test_lazy_layers_need_a_batch_first():
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(8, 8), nn.LazyLinear(8), nn.ReLU()).eval()

    lazy, ready, x = model(), model(), torch.randn(3, 8)
    for workloads in ([], [Workload("w", x)]):
        layers, skipped = inventory(lazy, workloads, SearchSpace())
        assert [layer.name for layer in layers] == ["0"]
        assert skipped == {"1": "not initialised yet: run one batch through the model first"}
    ready(x)
    assert [layer.name for layer in found(ready, x)[0]] == ["0", "1"]
    plan = Plan(model={}, layers={"1": LayerPlan("blast", 2, 2, 8, 8)})
    with pytest.raises(IncompatibleInputError, match=r"layer 1 .*run one batch"):
        apply(model(), plan)


def test_conv1d_is_found():
    utils = pytest.importorskip("transformers.pytorch_utils")
    model = nn.Sequential(utils.Conv1D(12, 8), nn.ReLU(), nn.Linear(12, 4))
    layers, _ = found(model, torch.randn(3, 8))
    assert [(layer.name, layer.shape) for layer in layers] == [("0", (12, 8))]


def test_plain_transformer_encoder_is_handled():
    """PyTorch's fused path reads linear1.weight and would bypass a replaced layer."""
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.TransformerEncoder(block, 2), nn.Linear(16, 3))
    x = torch.randn(2, 5, 16)
    layers, skipped = found(model, x)
    assert [layer.name.rpartition(".")[2] for layer in layers] == ["linear1", "linear2"] * 2
    assert "MultiheadAttention" in skipped["0.layers.0.self_attn.out_proj"]
    with torch.no_grad():
        before = model(x)
        zero = {layers[0].name: BlastLinear(16, 32, 2, 3).eval()}
        with swapped(model, layers, zero):
            changed = model(x)
            expected = zero[layers[0].name]
            assert not torch.allclose(changed, before)
            expected.bias.add_(1)
            assert not torch.allclose(model(x), changed)  # the new layer is really called
        torch.testing.assert_close(model(x), before)
        assert model[0].layers[0].activation_relu_or_gelu == 1


def test_a_model_that_cannot_be_called():
    with pytest.raises(IncompatibleInputError, match=r"workload 'w'.*Expected a tensor"):
        found(Net(), torch.zeros(2, 3, 5))


def test_nan_weight_names_the_layer():
    with pytest.raises(IncompatibleInputError, match=r"blocks\.1\.fc2.*NaN"):
        found(NanWeights().model(), ToyTask().workload())


def test_find_layers_without_workload():
    assert [layer.name for layer in find_layers(Net())][-1] == "head"


def test_stub_and_restore():
    model = Net().eval()
    layers = find_layers(model)
    before = get_modules(model, layers)
    with swapped(model, layers, stubs(before)), torch.no_grad():
        assert float(model(torch.randn(2, 3, WIDTH)).abs().max()) == 0
    assert get_modules(model, layers) == before


class Reading(nn.Module):
    """Reads its layers' attributes, as T5 (dtype), samplers (device) and GPT-2 (sizes) do."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        x = x.to(next(self.parameters()).device).to(self.first.weight.dtype)
        x = self.first(x)
        wide = getattr(self.second, "in_features", None) or self.second.nx
        return self.second(x[..., :wide] + self.first.bias) + 0


def reading(conv: bool) -> Reading:
    """Of nn.Linear, or of Hugging Face's Conv1D."""
    if not conv:
        return Reading(nn.Linear(6, 8), nn.Linear(8, 8))
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D  # of (out, in)
    return Reading(conv1d(8, 6), conv1d(8, 8))


@pytest.mark.parametrize("conv", [False, True])
def test_models_may_read_what_a_stub_stands_for(conv: bool):
    model = reading(conv).bfloat16().eval()
    x = torch.randn(2, 6)
    layers = find_layers(model)
    dense = get_modules(model, layers)
    assert len(dense) == 2
    owned = list(model.parameters())
    with swapped(model, layers, stubs(dense)), torch.no_grad():
        assert float(model(x).abs().max()) == 0
        assert model.first.in_features == 6
        for mine, theirs in zip(model.parameters(), owned, strict=True):
            assert mine is theirs
    assert get_modules(model, layers) == dense


@pytest.mark.parametrize("conv", [False, True])
def test_layers_whose_weight_the_model_reads_are_left_alone(conv: bool):
    """A BLAST layer would build it at each read, which no timing of the layer sees."""
    layers, skipped = found(reading(conv), torch.randn(2, 6))
    assert [layer.name for layer in layers] == ["second"]
    assert skipped == {"first": "its weight is read by the model's forward"}


def test_stubs_share_their_zeros():
    task = ToyTask()
    model = task.model()
    layers, _ = found(model, task.workload())
    dense = get_modules(model, layers)
    first, second, *_ = (m for n, m in stubs(dense).items() if n.endswith("fc1"))
    assert first(task.workload()) is second(task.workload())


def test_projections_of_multihead_attention_are_left_alone():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    for workloads in ([], [Workload("w", torch.randn(2, 3, 8))]):
        layers, skipped = inventory(layer, workloads, SearchSpace())
        assert [ly.name for ly in layers] == ["linear1", "linear2"]
        assert skipped == {"self_attn.out_proj": "inside nn.MultiheadAttention"}


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 32)
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        return self.head(self.b(self.norm(self.a(x))))


HOOKS = {
    "forward": lambda m: m.register_forward_hook(lambda *_: None),
    "backward": lambda m: m.register_full_backward_hook(lambda *_: None),
    "state_dict": lambda m: m.register_state_dict_post_hook(lambda *_: None),
    "load_state_dict": lambda m: m.register_load_state_dict_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_layers_with_hooks_of_any_kind_stay(kind: str):
    """What takes their place would not have the hooks."""
    model, x = Chain().eval(), torch.randn(3, 32)
    HOOKS[kind](model.a)
    layers, skipped = found(model, x)
    assert [layer.name for layer in layers] == ["b"]
    assert skipped["a"] == f"has {kind} hooks"
    plan = Plan(model={}, layers={"a": LayerPlan("blast", 2, 4, 32, 32)})
    with pytest.raises(IncompatibleInputError, match=f"layer a: has {kind} hooks"):
        apply(model, plan)
    apply(model, Plan(model={}, layers={"a": LayerPlan("dense", 0, 0, 32, 32)}))  # it keeps them


def test_plans_untie_no_weights():
    model = Chain()
    model.b.weight = model.a.weight
    plan = Plan(model={}, layers={"a": LayerPlan("blast", 2, 4, 32, 32)})
    with pytest.raises(IncompatibleInputError, match="layer a: weight tied to b"):
        apply(model, plan)


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_compiled_and_scripted_models_are_refused_by_name():
    model, plan = Chain().eval(), Plan(model={}, layers={})
    for wrapped, name in (
        (torch.compile(model), r"torch\.compile"),
        (torch.jit.trace(model, torch.randn(3, 32)), "ScriptModule"),
    ):
        with pytest.raises(IncompatibleInputError, match=name):
            find_layers(wrapped)
        with pytest.raises(IncompatibleInputError, match=name):
            apply(wrapped, plan)


def test_parameters_of_any_module_must_be_finite():
    """A saved model's must be, which was seen only after the retraining."""
    model = Chain().eval()
    with torch.no_grad():
        model.norm.bias[3] = float("inf")
    with pytest.raises(IncompatibleInputError, match="layer norm: its bias holds NaN or infinity"):
        find_layers(model)


@pytest.mark.filterwarnings("ignore:.*deprecated")
def test_quantised_modules_are_named():
    """Their state is no tensor, of which the advice was about get_extra_state."""
    model = Chain().eval()
    model.a = torch.ao.nn.quantized.dynamic.Linear(32, 32)
    with pytest.raises(IncompatibleInputError, match="a is a quantised Linear"):
        find_layers(model)
