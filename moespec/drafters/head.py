"""The EAGLE-3 draft head: its config, its modules under the native checkpoint names, loading and saving.

Owns the native layout (`fc`, `midlayer.*`, `norm`, `lm_head`, `d2t`, `t2d`) and the training-time forward. How a head
drafts is `eagle3.py`'s business; how it is trained is `moespec.train.drafter`'s.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from moespec.integrity import verify_manifest


@dataclass(frozen=True)
class Eagle3Config:
    """Shape and variants of a head. `tap_layers`: decoder layers whose entering residual is a feature."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    draft_vocab_size: int
    tap_layers: tuple[int, ...]
    target_hidden_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    norm_before_residual: bool = False
    norm_output: bool = False

    @staticmethod
    def from_json(values: dict, num_target_layers: int) -> Eagle3Config:
        """A native `config.json`. Without explicit taps: 2, n // 2 and n - 3, as EAGLE-3 has them."""
        unknown = [flag for flag in ("norm_before_fc", "fc_norm") if values.get(flag)]
        if unknown:
            raise ValueError(f"draft head options {', '.join(unknown)} are not supported.")
        n = num_target_layers
        taps = (values.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids") or (2, n // 2, n - 3)
        hidden = values["hidden_size"]
        return Eagle3Config(
            hidden_size=hidden,
            intermediate_size=values["intermediate_size"],
            num_attention_heads=values["num_attention_heads"],
            num_key_value_heads=values.get("num_key_value_heads", values["num_attention_heads"]),
            head_dim=values.get("head_dim") or hidden // values["num_attention_heads"],
            vocab_size=values["vocab_size"],
            draft_vocab_size=values.get("draft_vocab_size") or values["vocab_size"],
            tap_layers=tuple(taps),
            target_hidden_size=values.get("target_hidden_size") or hidden,
            rms_norm_eps=values.get("rms_norm_eps", 1e-6),
            rope_theta=values.get("rope_theta") or 10000.0,
            norm_before_residual=bool(values.get("norm_before_residual", False)),
            norm_output=bool(values.get("norm_output", False)),
        )

    def to_json(self) -> dict:
        """The native `config.json`."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "tap_layers"}
        return values | {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "num_hidden_layers": 1,
            "tie_word_embeddings": False,
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(self.tap_layers)},
        }


class _Attention(nn.Module):
    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        width_in, head_dim = 2 * config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(width_in, config.num_attention_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(width_in, config.num_key_value_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(width_in, config.num_key_value_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(config.num_attention_heads * head_dim, config.hidden_size, bias=False)


class _Mlp(nn.Module):
    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _Layer(nn.Module):
    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.hidden_norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = _Attention(config)
        self.mlp = _Mlp(config)


class Eagle3Head(nn.Module):
    """One decoder layer on [embedding of token t + 1, fused features of token t]. See section 2.2 of EAGLE-3."""

    d2t: Tensor | None
    t2d: Tensor | None

    def __init__(self, config: Eagle3Config) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(len(config.tap_layers) * config.target_hidden_size, config.hidden_size, bias=False)
        self.midlayer = _Layer(config)
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        has_map = config.draft_vocab_size != config.vocab_size
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long) if has_map else None)
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool) if has_map else None)
        self.embeddings: Tensor | None = None  # [vocab, hidden]; the target's unless the checkpoint has its own

    def draft_only(self, ids_V: Tensor) -> None:
        """Draft these target tokens, int64 [V'], and no others."""
        assert self.d2t is not None and self.t2d is not None
        self.d2t.copy_(ids_V - torch.arange(len(ids_V)))
        self.t2d.zero_()[ids_V] = True

    def draft_ids(self) -> Tensor | None:
        """The target's id of each draft token, int64 [V'], or None where they are the same."""
        return None if self.d2t is None else torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    def embed(self, tokens: Tensor) -> Tensor:
        assert self.embeddings is not None, "attach the target's embeddings first"
        return F.embedding(tokens, self.embeddings)

    def fuse(self, features: Tensor) -> Tensor:
        """g = fc(concat of the taps)."""
        return self.fc(features)

    def unrolled(self, tokens_BS: Tensor, features_BSF: Tensor, num_steps: int) -> Iterator[Tensor]:
        """The training-time test: logits [B, S, V'] of each unrolled step, tokens teacher-forced.

        `tokens_BS[t]` is token t + 1, `features_BSF[t]` the features of token t. At step i row t has read the
        embedding of token t + 1 + i (rows run off the end and must be masked) and predicts token t + 2 + i. Keys:
        causal over step 0, plus the same row's of steps 1..i; rotary position t + i.
        """
        keys: list[Tensor] = []
        values: list[Tensor] = []
        hidden_BSD = self.fuse(features_BSF)
        for step in range(num_steps):
            shifted_BS = F.pad(tokens_BS[:, step:], (0, step))
            state_BSD = self._training_layer(self.embed(shifted_BS), hidden_BSD, step, keys, values)
            yield self.lm_head(self.norm(state_BSD))
            hidden_BSD = self.norm(state_BSD) if self.config.norm_output else state_BSD

    def _training_layer(
        self, embeds_BSD: Tensor, hidden_BSD: Tensor, step: int, keys: list[Tensor], values: list[Tensor]
    ) -> Tensor:
        layer, config = self.midlayer, self.config
        normed_BSD = layer.hidden_norm(hidden_BSD)
        joined_BSX = torch.cat([layer.input_layernorm(embeds_BSD), normed_BSD], dim=-1)
        attention = layer.self_attn
        positions_S = torch.arange(step, step + joined_BSX.shape[1], device=joined_BSX.device)
        cos_Sd, sin_Sd = rotary(positions_S, config.head_dim, config.rope_theta)
        query = apply_rotary(self._heads(attention.q_proj(joined_BSX)), cos_Sd, sin_Sd)
        repeat = config.num_attention_heads // config.num_key_value_heads
        key = apply_rotary(self._heads(attention.k_proj(joined_BSX)), cos_Sd, sin_Sd)
        keys.append(key.repeat_interleave(repeat, dim=1))
        values.append(self._heads(attention.v_proj(joined_BSX)).repeat_interleave(repeat, dim=1))
        scale = config.head_dim**-0.5
        causal_SS = torch.ones(len(positions_S), len(positions_S), dtype=torch.bool, device=query.device).tril()
        scores = (query @ keys[0].transpose(-1, -2) * scale).masked_fill(~causal_SS, -torch.inf)
        own = [(query * earlier).sum(dim=-1, keepdim=True) * scale for earlier in keys[1:]]
        shares = torch.cat([scores, *own], dim=-1).float().softmax(dim=-1).to(query.dtype)
        attended = shares[..., : scores.shape[-1]] @ values[0]
        for number, value in enumerate(values[1:]):
            column = scores.shape[-1] + number
            attended = attended + shares[..., column : column + 1] * value
        residual_BSD = normed_BSD if config.norm_before_residual else hidden_BSD
        residual_BSD = residual_BSD + attention.o_proj(attended.transpose(1, 2).flatten(2))
        return residual_BSD + layer.mlp(layer.post_attention_layernorm(residual_BSD))

    def _heads(self, projected_BSX: Tensor) -> Tensor:
        return projected_BSX.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)


def rotary(positions_N: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """cos and sin, fp32 [N, head_dim], halves repeated (the Llama convention)."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, device=positions_N.device).float() / head_dim)
    angles = positions_N.float()[:, None] * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos_Nd: Tensor, sin_Nd: Tensor) -> Tensor:
    """Rotate [..., N, head_dim] by its rows' positions."""
    first, second = x.chunk(2, dim=-1)
    return x * cos_Nd.to(x.dtype) + torch.cat([-second, first], dim=-1) * sin_Nd.to(x.dtype)


def load_head(folder: Path, num_target_layers: int) -> Eagle3Head:
    """A head in the native layout. ValueError lists what is missing or unknown."""
    verify_manifest(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: it is no draft head.")
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        head = Eagle3Head(Eagle3Config.from_json(values, num_target_layers))
    except KeyError as error:
        raise ValueError(f"{folder}/config.json has no {error}: it is no draft head's.") from error
    except (AttributeError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder}/config.json cannot be read ({error}): fetch it again.") from error
    tensors = _read_tensors(folder)
    head.embeddings = tensors.pop("embed_tokens.weight", None)
    expected = head.state_dict()
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"{folder} is no EAGLE-3 head: missing {missing or 'nothing'}, unknown {unknown or 'nothing'}."
        )
    wrong = [name for name, tensor in tensors.items() if tensor.shape != expected[name].shape]
    if wrong:
        raise ValueError(f"{folder} does not match its config.json: {', '.join(wrong)} have other shapes.")
    endless = [name for name, tensor in tensors.items() if not torch.isfinite(tensor.float()).all()]
    if endless:
        raise ValueError(f"{folder} has values that are not finite in {', '.join(endless)}: fetch it again.")
    head.load_state_dict(tensors)
    return head.requires_grad_(False).eval()


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors")) or list(folder.glob("pytorch_model.bin"))
    if not files:
        raise ValueError(f"{folder} has neither model.safetensors nor pytorch_model.bin.")
    tensors: dict[str, Tensor] = {}
    for file in files:
        try:
            is_pickled = file.suffix == ".bin"
            tensors |= torch.load(file, map_location="cpu", weights_only=True) if is_pickled else load_file(file)
        except (SafetensorError, UnpicklingError, EOFError, RuntimeError) as error:
            raise ValueError(f"{file} is damaged or cut short ({error}): fetch it again.") from error
    return tensors


def save_head(head: Eagle3Head, folder: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write config.json and model.safetensors in the native layout."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(head.config.to_json(), indent=1) + "\n", encoding="utf-8")
    tensors = {
        name: tensor.detach().to(dtype).contiguous() if tensor.is_floating_point() else tensor
        for name, tensor in head.state_dict().items()
    }
    save_file(tensors, folder / "model.safetensors")
