"""The experts trained with on a CPU: values and gradients are those of the model's own eager experts, in fp64."""

from __future__ import annotations

import pytest
import torch

from moespec.hf import ALL_EXPERTS_FUNCTIONS
from moespec.train import experts as training_experts
from tests.conftest import tiny_model


@pytest.fixture
def trained(monkeypatch):
    """A tiny Qwen3-MoE in fp64 whose experts run through the training function."""
    monkeypatch.setattr(training_experts, "has_fast_bf16", lambda device: False)
    model = tiny_model("qwen3_moe").double().train()
    training_experts.use_training_experts(model, "cpu")
    return model


def gradients(model, ids):
    model.zero_grad()
    logits = model(ids, use_cache=False).logits
    logits.square().mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_values_and_gradients_equal_the_eager_experts(trained):
    ids = torch.randint(0, trained.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    ours, our_gradients = gradients(trained, ids)
    assert trained.config._experts_implementation == training_experts.NAME
    trained.set_experts_implementation("eager")
    theirs, their_gradients = gradients(trained, ids)
    torch.testing.assert_close(ours, theirs)
    assert our_gradients.keys() == their_gradients.keys()
    for name, gradient in their_gradients.items():
        torch.testing.assert_close(our_gradients[name], gradient, msg=lambda text, name=name: f"{name}: {text}")


def test_an_expert_without_tokens_gets_no_gradient_and_does_no_harm(trained):
    module = trained.model.layers[0].mlp.experts
    x_TD = torch.randn(5, trained.config.hidden_size, dtype=torch.float64, requires_grad=True)
    ids_TK = torch.tensor([[0, 2]] * 5)
    weights_TK = torch.full((5, 2), 0.5, dtype=torch.float64)
    with torch.no_grad():
        module.down_proj[1] = torch.nan
    out_TD = ALL_EXPERTS_FUNCTIONS[training_experts.NAME](module, x_TD, ids_TK, weights_TK)
    out_TD.sum().backward()
    assert out_TD.isfinite().all() and x_TD.grad.isfinite().all()
    assert not module.down_proj.grad[1].any() and module.down_proj.grad[2].any()
