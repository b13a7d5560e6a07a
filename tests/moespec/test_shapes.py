"""What is counted of a model without weights: the reference's table of four models, real tiny models, refusals."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.cache_utils import DynamicCache

from moespec.cost import WORKED_SHAPES
from moespec.published import PUBLISHED, published_config
from moespec.shapes import Storage, kv_bytes, meta_model, shape_of, weights_bytes
from tests.conftest import tiny_model

# The models' own configs, and what the reference prints: L, E, K, D, F, V; GB that every step reads, MB of an expert,
# GB of a plain step.
PRINTED = {
    "OLMoE-1B-7B": (
        OlmoeConfig(intermediate_size=1024, num_hidden_layers=16, num_experts=64, num_experts_per_tok=8),
        (16, 64, 8, 2048, 1024),
        (0.75, 12.58, 2.36),
    ),
    "Qwen3-30B-A3B": (
        Qwen3MoeConfig(
            hidden_size=2048,
            num_hidden_layers=48,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            intermediate_size=6144,
            moe_intermediate_size=768,
            num_experts=128,
            num_experts_per_tok=8,
            vocab_size=151_936,
        ),
        (48, 128, 8, 2048, 768),
        (2.46, 9.44, 6.08),
    ),
    "Mixtral-8x7B": (
        MixtralConfig(num_local_experts=8, num_experts_per_tok=2),
        (32, 8, 2, 4096, 14_336),
        (2.95, 352, 25.5),
    ),
    "gpt-oss-20b": (
        GptOssConfig(num_hidden_layers=24, num_local_experts=32, quantization_config={"quant_method": "mxfp4"}),
        (24, 32, 4, 2880, 2880),
        (2.44, 13.2, 3.71),
    ),
}


def test_counting_leaves_the_dtype_alone_that_all_threads_share(monkeypatch):
    asked = []
    own = torch.set_default_dtype
    monkeypatch.setattr(torch, "set_default_dtype", lambda dtype: (asked.append(dtype), own(dtype)))
    for name in PUBLISHED:
        config = published_config(name)
        config.dtype = torch.bfloat16
        meta_model(config)
        assert config.dtype == torch.bfloat16, "the caller's config stays theirs"
    assert set(asked) <= {torch.get_default_dtype()}


@pytest.mark.parametrize("name", PRINTED)
def test_a_config_has_the_printed_bytes(name):
    config, sizes, (dense_gb, expert_mb, plain_gb) = PRINTED[name]
    shape = shape_of(meta_model(config), name, Storage.of(config, None))
    assert sizes == (
        shape.num_moe_layers,
        shape.num_experts,
        shape.top_k,
        shape.hidden_size,
        shape.expert_ffn_size,
    )
    plain = shape.dense_bytes + shape.num_moe_layers * shape.top_k * shape.expert_bytes
    for found, printed in ((shape.dense_bytes / 1e9, dense_gb), (shape.expert_bytes / 1e6, expert_mb)):
        assert found == pytest.approx(printed, rel=0.007)  # printed with three digits
    assert plain / 1e9 == pytest.approx(plain_gb, rel=0.003)
    worked = WORKED_SHAPES[name]
    assert shape.dense_bytes == pytest.approx(worked.dense_bytes, rel=1e-3)  # which leaves norms and biases out
    assert shape.expert_bytes == pytest.approx(worked.expert_bytes, rel=2e-3)
    assert shape.dense_weights == pytest.approx(worked.dense_weights, rel=1e-3)
    assert shape.expert_weights == pytest.approx(worked.expert_weights, rel=1e-3)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_sizes_are_the_models_own(name):
    ours, theirs = published_config(name), PRINTED[name][0]
    shapes = [shape_of(meta_model(config), name, Storage.of(config, None)) for config in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert kv_bytes(ours, 5000, 2) == kv_bytes(theirs, 5000, 2)


def test_all_weights_are_those_that_the_models_are_named_for():
    # 6.92, 30.5 and 46.7 billion weights, by their cards; gpt-oss's checkpoint is 13.8 GB.
    for name, gigabytes in (
        ("OLMoE-1B-7B", 13.84),
        ("Qwen3-30B-A3B", 61.1),
        ("Mixtral-8x7B", 93.4),
        ("gpt-oss-20b", 13.8),
    ):
        config = published_config(name)
        assert weights_bytes(meta_model(config), Storage.of(config, None)) / 1e9 == pytest.approx(gigabytes, rel=3e-3)


def test_a_loaded_model_is_counted_as_it_lies_in_memory(family):
    model = tiny_model(family)
    shape = shape_of(model, family)
    layers = [layer.mlp for layer in model.model.layers]
    experts = sum(4 * p.numel() for mlp in layers for p in mlp.experts.parameters())
    everything = sum(4 * p.numel() for p in model.parameters())
    embeddings = 4 * model.model.embed_tokens.weight.numel()
    assert shape.dense_bytes == everything - experts - embeddings == 4 * shape.dense_weights
    assert shape.num_moe_layers * shape.num_experts * shape.expert_bytes == experts
    assert weights_bytes(model, Storage.of(model.config, torch.float32)) == everything


def test_embeddings_that_are_the_output_layer_are_read():
    config = OlmoeConfig(num_hidden_layers=1, tie_word_embeddings=True)
    tied = shape_of(meta_model(config), "tied", Storage.of(config, None))
    config.tie_word_embeddings = False
    untied = shape_of(meta_model(config), "untied", Storage.of(config, None))
    assert tied.dense_bytes == untied.dense_bytes


def test_shared_experts_and_dense_layers_are_always_read():
    sizes = {"num_hidden_layers": 3, "num_experts": 8, "moe_intermediate_size": 64, "hidden_size": 64}
    sizes |= {"intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 100}
    shared = shape_of(meta_model(Qwen2MoeConfig(**sizes, shared_expert_intermediate_size=128)), "shared")
    smaller = shape_of(meta_model(Qwen2MoeConfig(**sizes, shared_expert_intermediate_size=64)), "shared")
    assert shared.dense_weights - smaller.dense_weights == 3 * 3 * 64 * 64
    first_dense = shape_of(meta_model(Qwen2MoeConfig(**sizes, mlp_only_layers=[0])), "dense first")
    assert (first_dense.num_moe_layers, shared.num_moe_layers) == (2, 3)


@pytest.mark.parametrize(
    ("method", "experts", "linear"),
    [("mxfp4", 4.25 / 8, 2.0), ("fp8", 1 + 4 / 128**2, 1 + 4 / 128**2), (None, 2.0, 2.0)],
)
def test_quantized_weights_are_counted_as_stored(method, experts, linear):
    config = Qwen3MoeConfig(num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, vocab_size=1000, head_dim=64)
    model = meta_model(config)
    if method is not None:
        config.quantization_config = {"quant_method": method}
    shape = shape_of(model, "quantized", Storage.of(config, None))
    assert shape.expert_bytes == pytest.approx(experts * shape.expert_weights, abs=1)
    attention = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    )
    assert shape.dense_bytes == pytest.approx(2 * (shape.dense_weights - attention) + linear * attention, abs=1)
    assert shape_of(model, "loaded", Storage.of(config, torch.float32)).expert_bytes == 4 * shape.expert_weights


def test_keys_and_values_are_those_of_a_real_cache(family):
    model, cache = tiny_model(family), DynamicCache()
    model(torch.arange(11)[None], past_key_values=cache)
    held = sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))
    assert kv_bytes(model.config, 11, 4) == held


def test_a_sliding_layer_keeps_its_window_and_a_compressed_one_is_kept_expanded():
    config = published_config("gpt-oss-20b")
    per_position = 2 * 8 * 64 * 2  # keys and values of 8 heads of 64 in bf16
    assert kv_bytes(config, 1000, 2) == per_position * 12 * (1000 + 128)
    assert kv_bytes(config, 100, 2) == per_position * 24 * 100
    deepseek = DeepseekV3Config(num_hidden_layers=5)
    assert kv_bytes(deepseek, 10, 2) == 10 * 5 * 2 * 128 * (128 + 64 + 128)


def without_top_k():
    config = Qwen3MoeConfig(num_hidden_layers=1, num_experts=4, num_experts_per_tok=2)
    model = meta_model(config)
    del model.model.layers[0].mlp.gate.top_k
    return model


def with_two_kinds():
    model = meta_model(Qwen3MoeConfig(num_hidden_layers=2, num_experts=4, num_experts_per_tok=2))
    model.model.layers[1].mlp = meta_model(Qwen3MoeConfig(num_hidden_layers=1, num_experts=8)).model.layers[0].mlp
    return model


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: shape_of(meta_model(LlamaConfig(num_hidden_layers=1)), "llama"), "llama has no experts"),
        (lambda: shape_of(without_top_k(), "it"), "it does not say how many experts a token uses"),
        (lambda: shape_of(with_two_kinds(), "it"), "it has layers with different experts"),
        (
            lambda: Storage.of(OlmoeConfig(quantization_config={"quant_method": "awq"}), None),
            "quantization 'awq' has no",
        ),
        (lambda: meta_model(OlmoeConfig(hidden_size=-1)), "a model of type 'olmoe' cannot be built"),
    ],
)
def test_what_cannot_be_counted_is_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
