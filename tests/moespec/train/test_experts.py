"""The experts trained with: values and gradients are those of the model's own eager experts."""

from __future__ import annotations

import pytest
import torch

from moespec.hf import ALL_EXPERTS_FUNCTIONS
from moespec.train import experts as training_experts
from tests.conftest import tiny_model


@pytest.fixture(params=[training_experts.NAME, training_experts.GROUPED_NAME])
def trained(request, monkeypatch):
    """A tiny Qwen3-MoE whose experts run through one of the training functions; the grouped one knows no fp64."""
    is_grouped = request.param == training_experts.GROUPED_NAME
    monkeypatch.setattr(training_experts, "has_fast_bf16", lambda device: is_grouped)
    model = tiny_model("qwen3_moe").to(torch.float32 if is_grouped else torch.float64).train()
    training_experts.use_training_experts(model, "cpu")
    assert model.config._experts_implementation == request.param
    return model


def gradients(model, ids):
    model.zero_grad()
    logits = model(ids, use_cache=False).logits
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_values_and_gradients_equal_the_eager_experts(trained):
    ids = torch.randint(0, trained.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    ours, our_gradients = gradients(trained, ids)
    trained.set_experts_implementation("eager")
    theirs, their_gradients = gradients(trained, ids)
    torch.testing.assert_close(ours, theirs)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_an_expert_without_tokens_gets_no_gradient_and_does_no_harm(trained):
    module = trained.model.layers[0].mlp.experts
    x_TD = torch.randn(5, trained.config.hidden_size, dtype=trained.dtype, requires_grad=True)
    ids_TK = torch.tensor([[0, 2]] * 5)
    weights_TK = torch.full((5, 2), 0.5, dtype=trained.dtype)
    with torch.no_grad():
        module.down_proj[1] = torch.nan
    out_TD = ALL_EXPERTS_FUNCTIONS[trained.config._experts_implementation](module, x_TD, ids_TK, weights_TK)
    out_TD.sum().backward()
    assert out_TD.isfinite().all() and x_TD.grad.isfinite().all()
    assert not module.down_proj.grad[1].any() and module.down_proj.grad[2].any()
