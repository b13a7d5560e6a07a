"""Can draft trees be verified with this target? Asked of the target itself, once, before anyone relies on it.

Owns the question and its answer: a small tree in one pass against the same paths read token by token. Knows nothing of
why a model might fail it (a mask that it does not look at, a state that it keeps elsewhere).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moespec.kv_cache import TreeCache
from moespec.step_router import NaturalRouter
from moespec.target import Target
from moespec.types import ancestor_mask

PREFIX_LENGTH = 3
PARENTS = (-1, 0, 0, 1, 2)  # two branches of two tokens
# Of a row's logits; the middle row's counts, since in half precision rounding may turn a row's choice of experts.
MAX_RELATIVE_ERROR = {torch.float32: 1e-3}
MAX_RELATIVE_ERROR_HALF = 0.1


@torch.inference_mode()
def check_trees(target: Target) -> None:
    """ValueError, in one sentence, if a tree's rows do not get the logits that their own paths get."""
    num_tokens = PREFIX_LENGTH + len(PARENTS)
    ids_N = torch.linspace(0, target.vocab_size - 1, num_tokens, device=target.device).long()
    prefix_P, tokens_T = ids_N[:PREFIX_LENGTH], ids_N[PREFIX_LENGTH:]
    parents_T = torch.tensor(PARENTS, device=target.device)
    seen_TT = ancestor_mask(parents_T, max_depth=2)
    depths_T = seen_TT.sum(dim=1) - 1
    cache = TreeCache(len(target.layers))
    _read(target, prefix_P, cache)
    with target.stepping(NaturalRouter(len(PARENTS))):
        tree_TV = target.forward(tokens_T, depths_T + PREFIX_LENGTH, seen_TT, cache, keep=len(PARENTS)).clone()
    errors = []
    for row in range(len(PARENTS)):
        path_V = _read(target, torch.cat([prefix_P, tokens_T[seen_TT[row]]]), TreeCache(len(target.layers)))[-1]
        errors.append(float((tree_TV[row] - path_V).float().norm() / path_V.float().norm()))
    error = sorted(errors)[len(errors) // 2]
    if not error <= MAX_RELATIVE_ERROR.get(target.dtype, MAX_RELATIVE_ERROR_HALF):
        raise ValueError(
            f"{type(target.model).__name__} is not supported: a draft tree's rows do not get the logits of their own "
            f"paths (relative error {error:.1g})."
        )


def _read(target: Target, ids_N: Tensor, cache: TreeCache) -> Tensor:
    """Logits [N, V] of a text read into an empty cache, as a prompt is."""
    with target.stepping(NaturalRouter(len(ids_N))):
        positions_N = torch.arange(len(ids_N), device=target.device)
        return target.forward(ids_N, positions_N, None, cache, keep=len(ids_N)).clone()
