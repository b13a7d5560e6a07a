"""Which family a router is of: recognised by what it computed in a forward, not by its class name.

Owns the search: every formula that `routing.RouterFamily` can express, with the vectors and numbers found about the
router as its biases, scales and groups, until one reproduces the choice and the weights. Knows nothing of models.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moespec.routing import FAMILIES, Groups, RouterFamily, Weighing

EXACT, HALF = 1e-5, 2e-2  # relative: what fp32 and half precision may make of the same formula
NUM_BEST_OF_GROUP = (2, 1)  # DeepSeek-V3's groups are ranked by their best two experts, DeepSeek-V2's by the best


@dataclass(frozen=True)
class RouterSample:
    """What a router said of some rows, and what lies about it.

    logits_TE, weights_TK, ids_TK    its output
    vectors                          [E] tensors among its parameters, its parent's and its arguments: a bias, a scale
    groupings                        (groups, groups that a row may use) that it names
    jitter                           of a sparse mixer; None for all others
    """

    logits_TE: Tensor
    weights_TK: Tensor
    ids_TK: Tensor
    vectors: list[Tensor]
    groupings: list[tuple[int, int]]
    jitter: float | None

    @staticmethod
    def of(router: nn.Module, parent: nn.Module, args: tuple, output: tuple) -> RouterSample:
        """From one call of a router, `parent` being the module that holds it and its experts."""
        modules = (router, *(module for module in router.modules()), parent, *parent.children())
        owned = itertools.chain.from_iterable(_own_vectors(module) for module in dict.fromkeys(modules))
        candidates = {id(vector): vector for vector in (*owned, *(arg for arg in args if isinstance(arg, Tensor)))}
        num_experts = output[0].shape[-1]
        vectors = [vector.detach().flatten() for vector in candidates.values() if vector.numel() == num_experts]
        logits_TE, weights_TK, ids_TK = (part.detach() for part in output[:3])
        return RouterSample(
            logits_TE,
            weights_TK,
            ids_TK,
            # One that is the same for all experts changes no choice, and is found as a number where it scales.
            vectors=[vector for vector in vectors if vector.min() < vector.max()],
            groupings=list(_groupings(router, parent)),
            jitter=getattr(router, "router_jitter_noise", None),
        )


def _own_vectors(module: nn.Module) -> Iterator[Tensor]:
    """Its tensors, without what a linear layer adds: that is in its output already."""
    tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    return (tensor for name, tensor in tensors.items() if not (name == "bias" and "weight" in tensors))


def _groupings(*modules: nn.Module) -> Iterator[tuple[int, int]]:
    for owner in (part for module in modules for part in (module, getattr(module, "config", None))):
        num_groups = getattr(owner, "num_group", getattr(owner, "n_group", None))
        num_kept = getattr(owner, "topk_group", None)
        if num_groups and num_kept and num_kept < num_groups:
            yield num_groups, num_kept


def identify_family(sample: RouterSample) -> RouterFamily | str:
    """The family whose formula reproduces the sample, or the reason why there is none.

    Choices are compared first up to rounding in fp32, then, for a router that rounds its logits, up to its type's. A
    small bias may change no choice in a sample: formulas that use more of what lies about the router come first.
    """
    if sample.weights_TK.shape != sample.ids_TK.shape:
        return f"its router gives weights {tuple(sample.weights_TK.shape)} for experts {tuple(sample.ids_TK.shape)}"
    for tolerance, family in itertools.product((EXACT, HALF), _candidates(sample)):
        probs_TE = family.probabilities(sample.logits_TE)
        if not _chooses(family.selection(sample.logits_TE, probs_TE), sample, tolerance):
            continue
        found = _scaled(family, family.weights(sample.logits_TE, probs_TE, sample.ids_TK, None), sample)
        if found is not None:
            return _named(found)
    known = "softmax, sigmoid or sqrt-softplus scores, with or without bias and groups, renormalised or not"
    return f"its router is of an unknown family (known: {known})"


def _candidates(sample: RouterSample) -> list[RouterFamily]:
    """Formulas without a scale."""
    rules = (Weighing.RENORMALISED, Weighing.AS_THEY_ARE)
    if _are_probabilities(sample.logits_TE):
        return [RouterFamily("", "given", rule) for rule in rules]
    groups: list[Groups | None] = []
    for num_groups, num_kept in sample.groupings:
        ways = itertools.product(NUM_BEST_OF_GROUP, (-torch.inf, 0.0))
        groups += [Groups(num_groups, num_kept, num_best, excluded) for num_best, excluded in ways]
    biases: list[tuple[Tensor | None, bool]] = [(vector, it) for vector in sample.vectors for it in (False, True)]
    activations = ("softmax", "sigmoid", "sqrt-softplus")
    ways_to_rank = itertools.product((*groups, None), (*biases, (None, False)), activations, rules)
    found = [RouterFamily("", name, rule, *bias, group) for group, bias, name, rule in ways_to_rank]
    if sample.jitter is not None:
        found.append(RouterFamily("", "softmax", Weighing.SPARSE_MIXER, threshold=2 * sample.jitter))
    return found


def _are_probabilities(logits_TE: Tensor) -> bool:
    sums_T = logits_TE.float().sum(dim=-1)
    return bool((logits_TE >= 0).all()) and torch.allclose(sums_T, torch.ones_like(sums_T), atol=HALF)


def _chooses(selection_TE: Tensor, sample: RouterSample, tolerance: float) -> bool:
    """Whether the experts chosen are as good as the best by this ranking: of two alike either may be taken."""
    best_TK = selection_TE.topk(sample.ids_TK.shape[-1], dim=-1).values
    chosen_TK = selection_TE.gather(1, sample.ids_TK).sort(dim=-1, descending=True).values
    return bool(torch.isfinite(chosen_TK).all()) and torch.allclose(chosen_TK, best_TK, rtol=tolerance, atol=0)


def _scaled(family: RouterFamily, plain_TK: Tensor, sample: RouterSample) -> RouterFamily | None:
    """The family with the number, or the vector over experts, that its weights are multiplied by."""
    weights_TK = sample.weights_TK.float()
    tolerance = EXACT if sample.weights_TK.dtype == sample.logits_TE.dtype == torch.float32 else HALF
    for vector_E in (None, *(vector for vector in sample.vectors if vector is not family.bias_E)):
        scaled_TK = plain_TK if vector_E is None else plain_TK * vector_E.float()[sample.ids_TK]
        ratio_TK = weights_TK / scaled_TK
        scale = float(ratio_TK.median())
        if not 0 < scale < float("inf") or not torch.allclose(ratio_TK, ratio_TK.new_tensor(scale), rtol=tolerance):
            continue
        return replace(family, scale_E=vector_E, scale=1.0 if abs(scale - 1) < tolerance else round(scale, 5))
    return None


def _named(family: RouterFamily) -> RouterFamily:
    """One of FAMILIES where it is one of them; else with a name that says all of it."""
    is_plain = family.bias_E is None and family.groups is None and family.scale_E is None and family.scale == 1
    for known in FAMILIES if is_plain else ():
        if (known.activation, known.weighing) == (family.activation, family.weighing):
            return known
    parts = ["softmax" if family.activation == "given" else family.activation]
    parts += ["biased logits" if family.biases_logits else "biased"] if family.bias_E is not None else []
    parts += [f"{family.groups.num_kept} of {family.groups.num_groups} groups"] if family.groups is not None else []
    parts += [family.weighing.value]
    parts += ["by expert"] if family.scale_E is not None else []
    parts += [f"times {family.scale:g}"] if family.scale != 1 else []
    return replace(family, name=", ".join(parts))
