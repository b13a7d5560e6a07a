"""What the target says after each row of a tree: its likeliest tokens, and the row's own token.

The own token is the argmax, or at a temperature a draw from the processed distribution. Owns the processors (as
transformers': temperature, top-k, top-p) and the noise, which is keyed by (seed, position), so that a seed gives the
same text whatever the tree, the batch or the neighbours. Knows nothing of acceptance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moespec.config import GenerationConfig
from moespec.native import kernels_for, use_threads
from moespec.tree import NUM_ALTERNATIVES
from moespec.types import DraftTree

_MASK_64 = 2**64 - 1


@dataclass(frozen=True)
class TreeOpinions:
    """Both models' opinions of a tree, without the logits. Probabilities are unprocessed: no temperature, no top-p.

    best_T       int64; the target's likeliest token after each row, ties to the lower id
    top_ids_TA, top_logp_TA   the likeliest few and their log-probabilities fp32, best first
    node_logp_T  fp32; the target's log-probability of each row given its parent; 0 at the root
    """

    tree: DraftTree
    best_T: Tensor
    top_ids_TA: Tensor
    top_logp_TA: Tensor
    node_logp_T: Tensor

    @classmethod
    def of(cls, tree: DraftTree, logits_TV: Tensor) -> TreeOpinions:
        kernels = kernels_for(logits_TV)
        if kernels is not None:
            use_threads()
            num_best = min(NUM_ALTERNATIVES, logits_TV.shape[-1])
            arrays = (part.numpy() for part in (logits_TV.contiguous(), tree.parents_T, tree.tokens_T))
            ids_TA, logp_TA, node_logp_T = map(torch.from_numpy, kernels.head.opinions(*arrays, num_best))
            if node_logp_T.max() > 0.5:
                raise ValueError("the drafter proposed a row that does not stand behind its parent, or no known token.")
            return cls(tree, ids_TA[:, 0], ids_TA, logp_TA, node_logp_T)
        return cls(tree, *cls.tensors(logits_TV, tree.parents_T, tree.tokens_T))

    @staticmethod
    def tensors(logits_TV: Tensor, parents_T: Tensor, tokens_T: Tensor) -> list[Tensor]:
        """best_T, top_ids_TA, top_logp_TA and node_logp_T in torch's operations, on the logits' device."""
        num_best = min(NUM_ALTERNATIVES, logits_TV.shape[-1])
        top, total_T1 = logits_TV.topk(num_best, dim=-1), logits_TV.float().logsumexp(dim=-1, keepdim=True)
        up_T = parents_T.clamp(min=0)
        node_logp_T = logits_TV[up_T, tokens_T].float() - total_T1[up_T, 0]
        node_logp_T[:1].zero_()
        return [logits_TV.argmax(dim=-1), top.indices, top.values.float() - total_T1, node_logp_T]


def process_logits(logits_TV: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """fp32 logits [T, V] after temperature, top-k and top-p; excluded tokens are -inf. Ties as in transformers."""
    logits_TV = logits_TV.float() / temperature
    if 0 < top_k < logits_TV.shape[-1]:
        kth_T1 = logits_TV.topk(top_k, dim=-1).values[:, -1:]
        logits_TV = logits_TV.masked_fill(logits_TV < kth_T1, -torch.inf)
    if top_p < 1:
        ascending_TV, order_TV = logits_TV.sort(dim=-1)
        tail_TV = ascending_TV.softmax(dim=-1).cumsum(dim=-1) <= 1 - top_p
        tail_TV[:, -1] = False  # the best token always stays
        logits_TV = logits_TV.masked_fill(tail_TV.scatter(1, order_TV, tail_TV), -torch.inf)
    return logits_TV


def position_noise(seed: int, position: int, vocab_size: int, device: torch.device) -> Tensor:
    """Exp(1) noise fp32 [V] for the token at an absolute position: the same for every row that competes for it."""
    generator = torch.Generator(device)
    generator.manual_seed(_mix(seed, position) >> 32)  # the CPU generator takes 32 bits of its seed
    return torch.empty(vocab_size, dtype=torch.float32, device=device).exponential_(generator=generator)


def choose_tokens(
    logits_TV: Tensor, best_T: Tensor, tree: DraftTree, position: int, generation: GenerationConfig
) -> Tensor:
    """int64 [T]: the target's token after each row of the tree, at temperature 0 the likeliest, `best_T`.

    `position` is where the root's successor goes.

    argmax(p / noise) with Exp(1) noise is a draw from p without a host copy. Rows of one depth share their noise: only
    one of them can lie on the path that is taken, so the emitted tokens are independent draws.
    """
    if generation.temperature == 0:
        return best_T
    scores_TV = process_logits(logits_TV, generation.temperature, generation.top_k, generation.top_p)
    seed, (_, vocab_size), device = generation.seed, logits_TV.shape, logits_TV.device
    num_depths = 1 + (int(tree.depths_T.max()) if tree.max_depth is None else tree.max_depth)
    noise_NV = torch.stack([position_noise(seed, position + d, vocab_size, device) for d in range(num_depths)])
    return (scores_TV - noise_NV.log()[tree.depths_T]).argmax(dim=-1)


def _mix(seed: int, position: int) -> int:
    """splitmix64 of the pair: neighbouring seeds and positions give unrelated noise."""
    value = (seed * 0x9E3779B97F4A7C15 + position * 0xD1B54A32D192ED03 + 0x8CB92BA72F3D8DD7) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)
