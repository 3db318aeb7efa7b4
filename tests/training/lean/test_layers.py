"""LoRA's linear layers: PEFT's numbers, by fewer passes over memory."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

from loraplus_hydra.training.lean import frozen
from loraplus_hydra.training.lean.frozen import Frozen
from loraplus_hydra.training.lean.layers import lend_lean_layers
from tests.support.lean import assert_close, gradients


def network(dtype: torch.dtype = torch.float64, bias: bool = True, **lora: Any) -> Any:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(12, 10, bias=bias), nn.Tanh(), nn.Linear(10, 7, bias=bias)).to(dtype)
    model = get_peft_model(plain, LoraConfig(target_modules=["0", "2"], **{"r": 4, **lora}))  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def numbers(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
    out = model(x)
    return [out.detach(), *gradients((out.double() * torch.arange(out.numel()).view(out.shape).cos()).sum(), model)]


@settings(max_examples=40)
@given(
    rank=st.integers(1, 9),
    alpha=st.integers(1, 40),
    rslora=st.booleans(),
    bias=st.booleans(),
    tokens=st.integers(1, 9),
    onednn=st.booleans(),
)
def test_outputs_and_gradients_are_peft_s(
    rank: int, alpha: int, rslora: bool, bias: bool, tokens: int, onednn: bool
) -> None:
    lora = {"r": rank, "lora_alpha": alpha, "use_rslora": rslora}
    # oneDNN's packed products are float32, so they are as close to float64 as PEFT's are in float32.
    model = network(torch.float32 if onednn else torch.float64, bias, **lora)
    x = torch.randn(1, tokens, 12, dtype=torch.float32 if onednn else torch.float64)
    expected = numbers(copy.deepcopy(model).double(), x.double())
    own = max(relative_errors(numbers(model, x), expected))

    lent = lend_lean_layers(model, lambda: True, packed=onednn)

    assert lent == 2
    made = numbers(model, x)
    assert max(relative_errors(made, expected)) <= (max(3 * own, 1e-6) if onednn else 1e-12)


def relative_errors(made: list[torch.Tensor], expected: list[torch.Tensor]) -> list[float]:
    return [
        float((one.double() - other).abs().max() / other.abs().max().clamp(min=1e-3))
        for one, other in zip(made, expected, strict=True)
    ]


def test_the_input_s_gradient_is_peft_s() -> None:
    model = network()
    x = torch.randn(5, 12, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad(model(x).sum(), x)

    lend_lean_layers(model, lambda: True, packed=False)

    assert_close(list(torch.autograd.grad(model(x).sum(), x)), list(expected))


def test_a_base_in_bfloat16_keeps_its_adapter_in_float32() -> None:
    model = network(torch.bfloat16)
    x = torch.randn(6, 12, dtype=torch.bfloat16)
    expected = numbers(model, x)

    lend_lean_layers(model, lambda: True, packed=False)
    made = numbers(model, x)

    assert [each.dtype for each in made] == [each.dtype for each in expected]
    assert_close(made, expected, 2e-2)


def test_dropout_of_all_inputs_leaves_the_base() -> None:
    model = network(lora_dropout=1.0).train()
    x = torch.randn(5, 12, dtype=torch.float64)
    expected = numbers(model, x)

    lend_lean_layers(model, lambda: True, packed=False)

    assert_close(numbers(model, x), expected)


def test_dropout_masks_whole_inputs_and_keeps_their_mean() -> None:
    model = network(lora_dropout=0.25).train()
    x = torch.ones(1, 20_000, 12, dtype=torch.float64)
    lend_lean_layers(model, lambda: True, packed=False)

    torch.manual_seed(3)
    layer = model.base_model.model[0]
    out = layer(x)

    with torch.no_grad():
        whole = layer.base_layer(x)
        update = (out - whole) / layer.scaling["default"]
        every_mask = torch.linalg.lstsq(layer.lora_B["default"].weight, update[0].T).solution.T
    mean = every_mask.mean(0)
    without = x[0, 0] @ layer.lora_A["default"].weight.T
    assert (mean - without).abs().max() < 0.05  # the mean over 20,000 masks
    assert every_mask.std() > 0.1
    torch.manual_seed(3)
    assert torch.equal(layer(x), out)  # drawn from torch's own generator


def test_dropout_is_the_same_in_forward_and_backward() -> None:
    """With B = W = 0 after the mask, the gradient of B is what the mask let through."""
    model = network(lora_dropout=0.5, bias=False).train()
    layer = model.base_model.model[0]
    layer.base_layer.weight.data.zero_()
    lend_lean_layers(model, lambda: True, packed=False)
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)

    torch.manual_seed(1)
    out = layer(x)
    (grad_x,) = torch.autograd.grad(out.sum(), x)

    # The map is linear in x, so its own derivative gives its value.
    assert torch.isclose((grad_x * x).sum(), out.sum(), rtol=1e-12)
    assert (grad_x == 0).any()


def test_outside_of_a_lean_forward_peft_s_layers_run() -> None:
    model = network()
    x = torch.randn(3, 12, dtype=torch.float64)
    expected = model(x)

    lend_lean_layers(model, lambda: False, packed=False)

    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("change", [{"use_dora": True}, {"lora_bias": True}])
def test_other_layers_stay_as_they_are(change: dict[str, bool]) -> None:
    model = network(**change)
    x = torch.randn(3, 12, dtype=torch.float64)
    expected = numbers(model, x)

    assert lend_lean_layers(model, lambda: True, packed=False) == 0
    assert_close(numbers(model, x), expected, 0.0)


def test_a_disabled_adapter_leaves_the_base() -> None:
    model = network()
    x = torch.randn(3, 12, dtype=torch.float64)
    lend_lean_layers(model, lambda: True, packed=False)

    with model.disable_adapter():
        out = model(x)

    base = nn.Sequential(*(getattr(each, "base_layer", each) for each in model.base_model.model))
    assert torch.equal(out, base(x))


def test_frozen_layers_without_an_adapter_get_packed_weights() -> None:
    model = network(torch.float32)
    model.base_model.model.append(nn.Linear(7, 5).requires_grad_(False))
    x = torch.randn(3, 12)
    expected = numbers(model, x)

    assert lend_lean_layers(model, lambda: True, packed=True) == 3
    assert_close(numbers(model, x), expected, 3e-6)


def test_weights_are_packed_where_onednn_is_faster_and_they_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    for faster in (True, False):
        monkeypatch.setattr(frozen, "onednn_is_faster", lambda faster=faster: faster)
        assert frozen.should_pack([torch.empty(2**14, 2**14, device="meta")]) is faster
        assert not frozen.should_pack([torch.empty(2**14, 2**14, device="meta")] * 2)


@settings(max_examples=30)
@given(tokens=st.integers(0, 70), inputs=st.integers(1, 50), outputs=st.integers(1, 50))
def test_packed_products_are_as_exact_as_float32(tokens: int, inputs: int, outputs: int) -> None:
    torch.manual_seed(tokens)
    weight, x = torch.randn(outputs, inputs), torch.randn(tokens, inputs)
    packed = Frozen(weight, packed=True)

    assert_close([packed.forward(x).double()], [x.double() @ weight.double().T], 1e-6)
    gradient = torch.randn(outputs, tokens).t()  # not contiguous
    assert_close([packed.backward(gradient).double()], [gradient.double() @ weight.double()], 1e-6)


def test_a_weight_that_was_replaced_is_not_read_from_its_packed_copy() -> None:
    weight = nn.Parameter(torch.ones(2, 3), requires_grad=False)
    packed = Frozen(weight, packed=True)

    weight.data = torch.zeros(2, 3)

    assert packed.forward(torch.ones(1, 3)).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_without_gradients_many_tokens_run_through_one_product(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network(dtype).eval()
    x = torch.randn(50, 12, dtype=dtype)
    expected = model(x).detach()
    lend_lean_layers(model, lambda: True, packed=False)
    products: list[Any] = []
    monkeypatch.setattr(Frozen, "forward", lambda self, x: products.append(x) or x @ self.weight.t())

    with torch.no_grad():
        made = model(x)

    # A weight in bfloat16 would lose a small update, so its factors stay apart.
    assert len(products) == (2 if dtype == torch.bfloat16 else 0)
    assert_close([made], [expected], 1e-12 if dtype == torch.float64 else 2e-2)
