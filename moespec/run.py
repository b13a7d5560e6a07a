"""One request: prefill, then draft, verify, commit until something ends it.

Owns the loop and the conversation's consistency between steps: whatever happens, the cache covers every token but the
last. Knows nothing of how trees grow, budgets choose or traces are shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moespec.clock import Clock
from moespec.config import BudgetConfig, GenerationConfig, TreeConfig
from moespec.control import Control
from moespec.drafters.base import DraftContext, Drafter
from moespec.governors.base import Governor, Outcome
from moespec.kv_cache import TreeCache
from moespec.policies.base import ExpertPolicy
from moespec.prompts import end_ids
from moespec.recorder import policy_for
from moespec.report import Pieces, RunTotals, StepFacts, step_settings, step_trace, summarise
from moespec.sampling import choose_tokens
from moespec.step_router import NaturalRouter
from moespec.target import Target
from moespec.text import TextStream
from moespec.trace import StepTrace
from moespec.tree import root_only
from moespec.types import DraftTree, Verdict
from moespec.verifier import Draft, Verified, Verifier


@dataclass
class Conversation:
    """What is kept between turns. The cache covers every token of `token_ids` but the last."""

    cache: TreeCache
    token_ids: list[int] = field(default_factory=list)
    lossy_from: int | None = None  # first position whose KV stems from a changed routing

    def num_shared(self, prompt_ids: list[int]) -> int:
        """How many tokens it begins with that the prompt begins with, too."""
        pairs = zip(self.token_ids, prompt_ids, strict=False)
        common = next((n for n, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
        return min(len(self.token_ids), len(prompt_ids)) if common is None else common

    def reuse(self, prompt_ids: list[int]) -> int:
        """Cut back to what the prompt shares with it; returns the first position to compute."""
        # One position less than is shared: a drafter needs its features once more, for the token that comes next.
        start = max(0, min(self.num_shared(prompt_ids), self.cache.length) - 1)
        self.cache.truncate(start)
        if self.lossy_from is not None and self.lossy_from >= start:
            self.lossy_from = None
        return start


@dataclass(frozen=True)
class Aim:
    """The settings of a step, and what its tree starts from; without a context the root goes alone."""

    budget: BudgetConfig
    config: TreeConfig
    policy: ExpertPolicy | None
    context: DraftContext | None


# Of the clock: before and after drafting, before and after verifying.
Marks = tuple[Any, Any, Any, Any]


@dataclass
class Run:
    """A request on its way. `steps` reads like the method; everything else serves it."""

    target: Target
    verifier: Verifier
    drafter: Drafter | None
    conversation: Conversation
    pieces: Pieces
    prompt_ids: list[int]
    generation: GenerationConfig
    budget: BudgetConfig
    tree: TreeConfig
    control: Control
    governor: Governor | None
    card: Callable[[], dict]  # asked at the end: what runs the experts may have changed by then

    def __post_init__(self) -> None:
        self.ends = end_ids(self.target.model, self.target.tokenizer)
        self.text = TextStream(self.target.tokenizer, self.generation.stop)
        self.totals = RunTotals()
        self.clock = Clock(self.target.device)
        self.finish_reason: str | None = None
        self.path: list[int] = []  # rows that the last step accepted, the root first

    def steps(self) -> Iterator[StepTrace]:
        """1) prefill, never budgeted; 2) until the end: draft, verify, commit with the settings in force."""
        step = self.prefill()
        yield step
        while step.summary is None:
            step = self._step()
            yield step

    @torch.inference_mode()
    def prefill(self) -> StepTrace:
        """Read what of the prompt is not in the cache, and write the first token."""
        self.started = time.perf_counter()
        conversation, device = self.conversation, self.target.device
        start = conversation.reuse(self.prompt_ids)
        ids_N = torch.tensor(self.prompt_ids[start:], device=device)
        positions_N = torch.arange(start, len(self.prompt_ids), device=device)
        with self.target.stepping(NaturalRouter(len(ids_N))):
            logits_1V = self.target.forward(ids_N, positions_N, None, conversation.cache, keep=1)
        if self.drafter is not None:
            self.drafter.truncate(start)
            self.drafter.observe(self.target.features())
        best_1, root = logits_1V.argmax(dim=-1), root_only(self.prompt_ids[-1], device)
        token_1 = choose_tokens(logits_1V, best_1, root, len(self.prompt_ids), self.generation)
        conversation.token_ids = list(self.prompt_ids)
        emitted, text = self._emit(token_1.tolist())
        conversation.token_ids += emitted
        budget, tree = self.control.settings(self.budget, self.tree)
        elapsed_ms = self._elapsed_ms()
        facts = StepFacts("prefill", emitted, text, [0], step_settings(budget, None, tree), verify_ms=elapsed_ms)
        return self._added(self._trace(facts), elapsed_ms)

    @torch.inference_mode()
    def _step(self) -> StepTrace:
        began, drafting = time.perf_counter(), self.clock.mark()
        aim = self.aim()
        aim, tree = self.governed(aim, self.draft(aim))
        drafted = self.clock.mark()
        verified = self._verify(aim, tree)
        step = self.commit(aim, verified, (drafting, drafted, drafted, self.clock.mark()))
        return self.finished(step, began)

    def aim(self) -> Aim:
        """What is asked of the next step."""
        budget, config = self.control.settings(self.budget, self.tree)
        if self.governor is not None:
            config, budget = self.governor.settings(config, budget)
        policy, context, wanted = policy_for(budget, self.target.num_experts), None, self._num_wanted()
        if self.drafter is not None and config.total_tokens > 1 and wanted > 1:
            context = DraftContext(self.conversation.token_ids, config, max_depth=wanted - 1)
        return Aim(budget, config, policy, context)

    def draft(self, aim: Aim) -> DraftTree:
        """1) Draft: the drafter's tree below the last committed token."""
        if aim.context is None:
            return root_only(self.conversation.token_ids[-1], self.target.device)
        assert self.drafter is not None
        return self.drafter.propose(aim.context)

    def governed(self, aim: Aim, tree: DraftTree) -> tuple[Aim, DraftTree]:
        """What the governor takes of a drafted tree, and under which budget."""
        if self.governor is None or tree.num_rows == 1:
            return aim, tree
        tree, budget = self.governor.choose(tree.without_padding(), aim.budget)
        if budget is not aim.budget:
            aim = replace(aim, budget=budget, policy=policy_for(budget, self.target.num_experts))
        return aim, tree

    def to_verify(self, tree: DraftTree) -> Draft:
        return Draft(tree, self.conversation.cache, self.generation)

    def _verify(self, aim: Aim, tree: DraftTree) -> Verified:
        """2) Verify: one forward over all rows, every MoE layer under the policy."""
        return self.verifier.verify(self.to_verify(tree), aim.policy)

    def commit(self, aim: Aim, verified: Verified, marks: Marks) -> StepTrace:
        """3) Commit: what is emitted, the KV of its rows, their features for the drafter."""
        conversation, prefix = self.conversation, len(self.conversation.token_ids) - 1
        verdict, counts = verified.verdict, verified.counts
        if counts.changed and conversation.lossy_from is None:
            conversation.lossy_from = prefix
        emitted, text = self._emit(verdict.token_ids)
        self._keep(verdict.path[: len(emitted)], emitted, prefix, verified.features_TF)
        self.path = verdict.path[: len(emitted) + 1]
        facts = StepFacts(
            kind="tree" if verified.opinions.tree.num_rows > 1 else "plain",
            token_ids=emitted,
            text=text,
            origins=[*range(1, verdict.num_accepted + 1), 0][: len(emitted)],
            settings=step_settings(aim.budget, self._effective_budget(aim.budget, verified), aim.config),
            draft_ms=self.clock.ms(*marks[:2]),
            verify_ms=self.clock.ms(*marks[2:]),
            # Of a step that an end cut short, the rows behind the end were not accepted.
            tree=(verified.opinions, Verdict(self.path, emitted)),
            counts=counts,
            share_read=verified.share_read,
        )
        return self._trace(facts)

    def finished(self, step: StepTrace, began: float) -> StepTrace:
        """The step with its last figures: of what began so long ago, `other_ms` is neither drafting nor verifying."""
        whole_ms = (time.perf_counter() - began) * 1e3
        step.other_ms = whole_ms - step.draft_ms - step.verify_ms
        if self.governor is not None:
            rest_ms = whole_ms - step.draft_ms
            self.governor.observe(Outcome(self.path, len(step.token_ids), step.draft_ms, rest_ms, step.mass_kept))
        return self._added(step, self._elapsed_ms())

    def _keep(self, path: list[int], emitted: list[int], prefix: int, features_TF: Tensor | None) -> None:
        """Keep the rows of the root and of the emitted draft tokens; the last emitted token is the next root."""
        self.conversation.cache.keep_path(prefix, path)
        self.conversation.token_ids += emitted
        if self.drafter is not None:
            self.drafter.observe(None if features_TF is None else features_TF[path])

    def _emit(self, token_ids: list[int]) -> tuple[list[int], str]:
        """What is really emitted (up to an end, a stop string, a limit or the stop signal), and its text."""
        wanted = self._num_wanted()
        emitted = token_ids[:wanted]
        ends = set() if self.generation.ignore_eos else self.ends
        end = next((number for number, token in enumerate(emitted) if token in ends), len(emitted))
        text, num_read = self.text.push(emitted[:end])
        if self.text.stopped:
            emitted, self.finish_reason = emitted[:num_read], "stop"
        elif end < len(emitted):
            emitted, self.finish_reason = emitted[: end + 1], "eos"
        elif len(emitted) == wanted:
            written = len(self.totals.token_ids) + len(emitted)
            self.finish_reason = "length" if written >= self.generation.max_new_tokens else "context"
        elif self.control.stopped:
            self.finish_reason = "stopped"
        return emitted, text + self.text.finish() if self.finish_reason else text

    def _num_wanted(self) -> int:
        """Tokens that may still be written, by the limit asked for and by the context."""
        by_limit = self.generation.max_new_tokens - len(self.totals.token_ids)
        return min(by_limit, self.target.max_context - len(self.conversation.token_ids))

    def _effective_budget(self, budget: BudgetConfig, verified: Verified) -> int | None:
        if budget.budget is None or not verified.is_budgeted:
            return None
        return min(max(budget.budget, self.target.top_k), self.target.num_experts)

    def _elapsed_ms(self) -> float:
        return (time.perf_counter() - self.started) * 1e3

    def _trace(self, facts: StepFacts) -> StepTrace:
        lossless = self.conversation.lossy_from is None
        return step_trace(facts, self.totals.num_steps_seen, lossless, self.target, self.pieces)

    def _added(self, step: StepTrace, t_ms: float) -> StepTrace:
        """The step, added to the run's totals; the last one with the summary."""
        step.t_ms = t_ms
        self.totals.add(step)
        if self.finish_reason:
            step.summary = summarise(self)
        return step
