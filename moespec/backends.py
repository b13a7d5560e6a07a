"""Which code runs the experts inside a step: the choice, its reason, and what happens where a kernel fails.

Owns the backend "triton", which hands a layer to our kernels. Knows nothing of budgets or trees.
"""

from __future__ import annotations

import logging
import weakref
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from moespec.experts import CpuExperts, reference_experts
from moespec.hf import ALL_EXPERTS_FUNCTIONS

if TYPE_CHECKING:
    from kernels.lists import ExpertLists
    from kernels.select import Rule
    from kernels.weights import ExpertWeights, Gate
    from moespec.routing import RouterFamily

_log = logging.getLogger(__name__)
BACKENDS = ("auto", "reference", "cpu", "triton")


class Backend(Protocol):
    """An experts function with a name and the reason why it runs; both may change where a kernel fails."""

    name: str
    reason: str

    def __call__(self, experts: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """[T, D]; a pair of weight 0 touches no expert."""
        ...


class TorchBackend:
    """A function of `experts.py` under its name."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        self._run = reference_experts if name == "reference" else CpuExperts()

    def __call__(self, experts: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return self._run(experts, x_TD, ids_TK, weights_TK)


class TritonBackend:
    """Our Triton kernels for a tree's rows; transformers' grouped products for longer passes, which are prompts.

    A kernel that does not compile or launch here is tried once: from then on one product per kept expert takes its
    place, and name and reason say so.
    """

    def __init__(self, reason: str) -> None:
        self.name, self.reason = "triton", reason
        self._weights: weakref.WeakKeyDictionary[Any, ExpertWeights] = weakref.WeakKeyDictionary()
        self._lists: weakref.WeakKeyDictionary[Any, ExpertLists] = weakref.WeakKeyDictionary()
        self._instead: TorchBackend | None = None

    def refresh(self) -> None:
        """Look at the modules' parameters anew: they were changed."""
        self._weights.clear()

    def expect(self, experts: Any, lists: ExpertLists) -> None:
        """The lists of the plan that this module is called with next: whoever planned has made them already."""
        self._lists[experts] = lists

    def __call__(self, experts: Any, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        from kernels.checks import MAX_ROWS
        from kernels.experts import moe_experts

        lists = self._lists.pop(experts, None)
        if self._instead is not None:
            return self._instead(experts, x_TD, ids_TK, weights_TK)
        if len(x_TD) > MAX_ROWS:
            return ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, x_TD, ids_TK, weights_TK)
        if experts not in self._weights:
            self._weights[experts] = expert_weights(experts)
        if lists is not None and lists.weights_TK is weights_TK:
            # Part of a step of fixed shape: if it fails, whoever runs the step runs all of it another way.
            return moe_experts(x_TD, ids_TK, weights_TK, self._weights[experts], lists)
        try:
            return moe_experts(x_TD, ids_TK, weights_TK, self._weights[experts])
        except Exception as error:  # Triton's compiler and driver raise whatever they like
            return self.give_up(error)(experts, x_TD, ids_TK, weights_TK)

    def give_up(self, error: Exception) -> TorchBackend:
        """Run without kernels from now on, since one failed with this error."""
        _log.warning("no Triton kernels from now on", exc_info=error)
        self._instead = TorchBackend("grouped-loop", "")
        self.name = self._instead.name
        self.reason = f"a Triton kernel failed here ({type(error).__name__}: {_first_line(error)})"
        return self._instead


def choose_backend(wanted: str, device: torch.device, all_experts: list[Any]) -> Backend:
    """The backend for experts modules on a device. ValueError where the one that is wanted cannot run."""
    if wanted not in BACKENDS:
        raise ValueError(f"backend={wanted!r} is not one of {', '.join(BACKENDS)}.")
    if wanted == "reference":
        return TorchBackend("reference", "asked for: one row and slot at a time")
    if wanted == "cpu" and device.type != "cpu":
        raise ValueError(f"backend='cpu' cannot run: the model is on {device}.")
    if wanted == "cpu" or (wanted == "auto" and device.type == "cpu"):
        return TorchBackend("cpu", "the model is on the CPU")
    why_not = _no_triton_reason(device, all_experts)
    if why_not is None:
        return TritonBackend(f"the model is on {device.type}, which our Triton kernels run on")
    if wanted == "triton":
        raise ValueError(f"backend='triton' cannot run: {why_not}.")
    return TorchBackend("grouped-loop", f"no Triton: {why_not}; one product per kept expert")


def _no_triton_reason(device: torch.device, all_experts: list[Any]) -> str | None:
    try:
        from kernels.experts import unsupported_reason
    except ImportError:
        return "triton is not installed"
    if device.type == "cuda" and device.index not in (None, torch.cuda.current_device()):
        return f"Triton launches on cuda:{torch.cuda.current_device()}, and the model is on {device}"
    for experts in all_experts:
        if _gate_of(experts) is None:
            return f"the activation of {type(experts).__name__} is none that the kernels know"
        reason = unsupported_reason(expert_weights(experts), device)
        if reason is not None:
            return reason
    return None


def rule_of(family: RouterFamily) -> Rule | None:
    """How the select kernel makes this family's weights; None if it cannot."""
    from kernels.select import Rule

    rules = {
        "softmax, top-k, renormalised": Rule.RENORMALISED,
        "softmax, top-k": Rule.SOFTMAX,
        "top-k, softmax": Rule.SOFTMAX_OF_CHOSEN,
    }
    return rules.get(family.name)


def expert_weights(experts: Any) -> ExpertWeights:
    """A transformers experts module as the kernels read it: views of its parameters, nothing is copied."""
    from kernels.weights import ExpertMatrix, ExpertWeights

    up, down = experts.gate_up_proj.detach(), experts.down_proj.detach()
    if experts.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    up_bias, down_bias = (
        (experts.gate_up_proj_bias.detach(), experts.down_proj_bias.detach()) if experts.has_bias else (None, None)
    )
    gate = _gate_of(experts)
    assert gate is not None, "the backend was chosen for experts whose activation is known"
    interleaved = not getattr(experts, "is_concatenated", True)
    return ExpertWeights(ExpertMatrix(up, bias=up_bias), ExpertMatrix(down, bias=down_bias), gate, interleaved)


def _gate_of(experts: Any) -> Gate | None:
    """The activation, recognised by what it computes: SiLU, or gpt-oss' with its own limits."""
    from kernels.weights import Gate

    candidates = [Gate()]
    if hasattr(experts, "alpha") and hasattr(experts, "limit"):
        candidates.append(Gate(float(experts.alpha), float(experts.limit), 1.0))
    parameter = experts.down_proj
    probe_2X = torch.linspace(-9, 9, 16, device=parameter.device, dtype=torch.float32).view(1, -1).repeat(2, 1)
    probe_2X[1] = probe_2X[1].flip(0)
    interleaved = not getattr(experts, "is_concatenated", True)
    parts = (probe_2X[:, ::2], probe_2X[:, 1::2]) if interleaved else probe_2X.chunk(2, dim=-1)
    found_2F = experts._apply_gate(probe_2X)
    return next((gate for gate in candidates if torch.allclose(gate(*parts), found_2F, atol=1e-5)), None)


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
