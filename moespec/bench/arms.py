"""What a decode benchmark compares, and the names it goes by. Knows nothing of how arms are run.

A name is `transformers`, `plain`, `eagle3`, `moe-spec:POLICY:BUDGET[:SCORE]` or what `parse_policy` reads, such as
`sere:s=2`; `@TOTAL,DEPTH,TOPK[,MINP]` behind it sets the draft tree. SCORE joins with `+`: natural, depth or path,
root. Without it the score is the paper's.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from moespec.config import BudgetConfig, TreeConfig
from moespec.policies.parsing import parse_policy

BUDGETS = (8, 12, 16, 24, 32, 48)
GOVERNORS = ("evict", "cascade-like", "utility")
OUR_SCORE = "natural+path"  # the best of six at B = 8 and 12; those with depth or root lose far more than the paper's
DEFAULT, PLAIN = TreeConfig(), TreeConfig(1)
LARGE = TreeConfig(16, 5, 4, min_path_p=0)  # every step as large as the last, as in the paper
TREES = (DEFAULT, TreeConfig(16, 8, 3, min_path_p=0.06), LARGE, TreeConfig(32, 6, 6, 0))


@dataclass(frozen=True)
class Arm:
    """One way to write the same prompts. `tree` and `budget` are None for transformers' own generate."""

    name: str
    tree: TreeConfig | None = None
    budget: BudgetConfig | None = None
    governor: str = "fixed"  # a name of `governors.parse_governor`

    @property
    def is_lossy(self) -> bool:
        return self.has_floor or (self.budget is not None and not self.budget.is_lossless)

    @property
    def has_floor(self) -> bool:
        """Whether a governor chooses the budget."""
        return "floor" in self.governor

    @property
    def tree_numbers(self) -> list[int | float] | None:
        return None if self.tree is None else self.tree.numbers

    @property
    def key(self) -> str:
        """Unique among the arms: the name and the tree."""
        speculates = self.tree is not None and self.tree.total_tokens > 1
        return f"{self.name}@{','.join(f'{n:g}' for n in self.tree_numbers or [])}" if speculates else self.name


def default_arms() -> list[Arm]:
    """Transformers, plain, EAGLE-3 at each tree, and every budget with both policies and our best score.

    Budgets are compared at the large tree, as the paper's are, and with the paper's score at the default tree too; 16
    also at the others: its best need not be EAGLE-3's.
    """
    arms = [Arm("transformers"), Arm("plain", PLAIN, BudgetConfig())]
    arms += [Arm("eagle3", tree, BudgetConfig()) for tree in TREES]
    for policy, score in (("substitution", ""), ("truncation", ""), ("substitution", f":{OUR_SCORE}")):
        for budget in BUDGETS:
            trees = TREES if budget == 16 else (LARGE,) if score else (DEFAULT, LARGE)
            arms += [_moe_spec(f"moe-spec:{policy}:{budget}{score}", tree) for tree in trees]
    return arms


def parse_arms(names: str | None, profiles: Path | None = None) -> list[Arm]:
    """Arms of names joined by spaces or semicolons; all arms for None. ValueError names what is no arm.

    Plain decoding is always among them: its text is the one that lossy texts are compared with.
    """
    if names is None:
        return default_arms()
    named = [parse_arm(name, profiles) for name in names.replace(";", " ").split()]
    arms = list({arm.key: arm for arm in named}.values())
    return arms if any(arm.name == "plain" for arm in arms) else [parse_arm("plain"), *arms]


def parse_arm(text: str, profiles: Path | None = None) -> Arm:
    """The arm of one name; `profiles`: where calibration files are. ValueError names what is no arm."""
    name, _, numbers = text.partition("@")
    if numbers and name in ("transformers", "plain"):
        raise ValueError(f"arm {text!r} cannot be run: {name} drafts no tree.")
    if name == "transformers":
        return Arm(name)
    if name == "plain":
        return Arm(name, PLAIN, BudgetConfig())
    method, _, rest = name.partition(":")
    try:
        tree = TreeConfig.parse(numbers) if numbers else DEFAULT
        if name == "eagle3":
            return Arm(name, tree, BudgetConfig())
        if method in GOVERNORS:
            return Arm(name, tree, BudgetConfig(), governor=name)
        if method == "moe-spec" and "=" not in rest:
            return _moe_spec(name, tree)
        return Arm(name, tree, parse_policy(name, profiles))
    except ValueError as error:
        raise ValueError(f"arm {text!r} cannot be run: {error}") from error


def _moe_spec(name: str, tree: TreeConfig) -> Arm:
    method, policy, budget, score = [*name.split(":"), "", "", ""][:4]
    parts = set(filter(None, score.split("+")))
    understood = method == "moe-spec" and budget.isdecimal() and name.count(":") <= 3
    if not understood or parts - {"natural", "depth", "path", "root"}:
        raise ValueError(
            "write moe-spec:b=16,score=natural and the like, or moe-spec:POLICY:BUDGET[:natural+depth+path+root]."
        )
    return Arm(
        name,
        tree,
        BudgetConfig(
            budget=int(budget),
            policy=policy,
            score="natural" if "natural" in parts else "softmax",
            row_weight=next((kind for kind in ("depth", "path") if kind in parts), "uniform"),
            protect_root="root" in parts,
        ),
    )
