"""A draft head's config.json, in the layouts that people have, and our own.

| layout                                | known by                         |
|---------------------------------------|----------------------------------|
| native (SafeAILab, SpecForge, SGLang) | no `speculators_model_type`      |
| speculators (vLLM)                    | `speculators_model_type: eagle3` |

A tap is the residual entering a decoder layer, as in SafeAILab's code. Lists of taps come in two meanings, one apart,
and each runtime looks for its own in another place:
- `eagle_aux_hidden_state_layer_ids` at the top is vLLM's: n enters layer n.
- The same key inside `eagle_config` is SpecForge's and SGLang's. A list that begins with 1 names outputs, so that n
  enters layer n + 1: the first tap of every recipe is the output of layer 1. Any other list names what enters layers,
  as SpecForge's for Kimi-K2 does (2, 30 and 58 of 61): so vLLM reads it, and SGLang for DeepSeek targets since its pull
  request 25454, while other targets' lists are outputs to it still.
Without a list the taps enter layers 2, n // 2 and n - 3 of n. Who knows better says so: the head for OLMoE-1B-7B
(`wantsleep/OLMoE_1B_7B_Eagle3`) was trained on 2, n // 2 and n - 1, which its config does not tell.

Knows nothing of weights or targets.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moespec.drafters.head import Eagle3Config
from moespec.drafters.rope import Rope

TAPS = "eagle_aux_hidden_state_layer_ids"
_FLAGS = ("norm_output", "norm_before_fc", "fc_norm")
_ONLY = {"num_hidden_layers": 1, "hidden_act": "silu"}  # what `head.py` computes; other values are refused


def read_values(path: Path) -> dict[str, Any]:
    """What the file says. ValueError where it cannot be read."""
    if not path.is_file():
        raise ValueError(f"{path.parent} has no config.json: it is no draft head.")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): fetch it again.") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} cannot be read (it is no object): fetch it again.")
    return values


def config_of(
    path: Path, values: dict[str, Any], num_target_layers: int, tap_layers: tuple[int, ...] | None
) -> Eagle3Config:
    """The config that a file's values describe, in either layout; `tap_layers` instead of those that it names.

    ValueError in one sentence for what no config of a head says, or what no head here can do.
    """
    try:
        kind = values.get("speculators_model_type", "eagle3")
        if kind != "eagle3":
            raise ValueError(f"a speculator of the kind {kind!r} is not supported")
        is_native = "speculators_model_type" not in values
        layer = values if is_native else values["transformer_layer_config"]
        _refuse_others(layer, values)
        taps = tap_layers or _taps(values) or (2, num_target_layers // 2, num_target_layers - 3)
        hidden, num_heads = _whole(layer, "hidden_size"), _whole(layer, "num_attention_heads")
        vocab = _whole(layer, "vocab_size")
        config = Eagle3Config(
            hidden_size=hidden,
            intermediate_size=_whole(layer, "intermediate_size"),
            num_attention_heads=num_heads,
            num_key_value_heads=_whole(layer, "num_key_value_heads", num_heads),
            head_dim=_whole(layer, "head_dim", hidden // num_heads),
            vocab_size=vocab,
            draft_vocab_size=_whole(values, "draft_vocab_size", vocab),
            tap_layers=tuple(taps),
            target_hidden_size=_whole(values, "target_hidden_size", hidden),
            rms_norm_eps=layer.get("rms_norm_eps", 1e-6),
            rope=Rope.of(layer),
            # vLLM's default for speculators is not the one for native heads.
            norm_before_residual=bool(values.get("norm_before_residual", not is_native)),
            **{flag: bool(values.get(flag)) for flag in _FLAGS},
        )
        if config.num_attention_heads % config.num_key_value_heads:
            raise ValueError(f"{config.num_attention_heads} heads over {config.num_key_value_heads} key-value heads")
    except KeyError as error:
        raise ValueError(f"{path} has no {error}: it is no draft head's.") from error
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): fetch it again.") from error
    except ValueError as error:
        raise ValueError(f"{path} asks for what no draft head here can do: {error}.") from error
    return config


def _whole(values: dict[str, Any], name: str, default: int | None = None) -> int:
    """A number that is 1 or more. KeyError where it is left out and has no default, TypeError for anything else."""
    value = default if values.get(name) is None else values[name]
    if value is None:
        raise KeyError(name)
    if type(value) is not int or value < 1:
        raise TypeError(f"{name} is {value!r}")
    return value


def _refuse_others(layer: dict[str, Any], values: dict[str, Any]) -> None:
    """ValueError for a head of another formula."""
    wrong = [f"{name}={layer[name]!r}" for name, only in _ONLY.items() if layer.get(name, only) != only]
    if (values.get("eagle_config") or {}).get("use_aux_hidden_state") is False:
        wrong.append("use_aux_hidden_state=False")
    if wrong:
        raise ValueError(", ".join(wrong))


def _taps(values: dict[str, Any]) -> list[int] | None:
    """The layers that the listed taps enter; None without a list."""
    entering, other = values.get(TAPS), (values.get("eagle_config") or {}).get(TAPS)
    if any(type(number) is not int for number in [*(entering or ()), *(other or ())]):
        raise TypeError(f"{TAPS} is {entering or other!r}")
    if entering:
        return entering
    return [number + 1 for number in other] if other and other[0] == 1 else other


def to_json(config: Eagle3Config) -> dict[str, Any]:
    """The native `config.json`, with the taps where vLLM and where SGLang looks for them."""
    values = {name: getattr(config, name) for name in config.__dataclass_fields__ if name not in ("tap_layers", "rope")}
    return values | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "tie_word_embeddings": False,
        "rope_theta": config.rope.theta,
        "rope_scaling": config.rope.scaling,
        TAPS: list(config.tap_layers),
        "eagle_config": {TAPS: [number - 1 for number in config.tap_layers]},
    }
