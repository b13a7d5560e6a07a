"""The page's controls, grouped as people think: how much to load, how far to guess, how to write.

Owns the widgets and how their values become the engine's three configs. Knows nothing of chats or panels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr

from moespec import BudgetConfig, GenerationConfig, TreeConfig

if TYPE_CHECKING:
    from moespec import EngineInfo

SCORES = {"the paper's: all router probability": "softmax", "only weight that would be used": "natural"}
ROW_WEIGHTS = {"all rows alike (the paper's)": "uniform", "by depth": "depth", "by the drafter's confidence": "path"}


@dataclass(frozen=True)
class Settings:
    """What the controls ask for."""

    generation: GenerationConfig
    budget: BudgetConfig
    tree: TreeConfig


@dataclass(frozen=True)
class Controls:
    """The widgets, in the order in which `read` takes their values."""

    lossless: gr.Checkbox
    budget: gr.Slider
    policy: gr.Radio
    score: gr.Radio
    row_weight: gr.Radio
    protect_root: gr.Checkbox
    total_tokens: gr.Slider
    depth: gr.Slider
    top_k: gr.Slider
    min_path_p: gr.Slider
    temperature: gr.Slider
    max_new_tokens: gr.Slider
    seed: gr.Number
    ignore_eos: gr.Checkbox

    @property
    def all(self) -> list[Any]:
        return [*self.live, self.temperature, self.max_new_tokens, self.seed, self.ignore_eos]

    @property
    def live(self) -> list[Any]:
        """Those that act on an answer that is being written."""
        load = [self.lossless, self.budget, self.policy, self.score, self.row_weight, self.protect_root]
        return [*load, self.total_tokens, self.depth, self.top_k, self.min_path_p]


def read_live(values: tuple) -> tuple[BudgetConfig, TreeConfig]:
    """The values of `Controls.live` as configs. ValueError names what is not allowed."""
    lossless, budget, policy, score, row_weight, protect_root, *tree = values
    if lossless:
        return BudgetConfig(), TreeConfig(*map(_whole, tree))
    if budget is None:
        raise ValueError("Choose how many experts a layer may read, or tick No budget.")
    config = BudgetConfig(
        budget=_whole(budget), policy=policy, score=score, row_weight=row_weight, protect_root=protect_root
    )
    return config, TreeConfig(*map(_whole, tree))


def read(values: tuple) -> Settings:
    """The values of `Controls.all` as configs. ValueError names what is not allowed."""
    *live, temperature, max_new_tokens, seed, ignore_eos = values
    budget, tree = read_live(tuple(live))
    generation = GenerationConfig(
        max_new_tokens=_whole(max_new_tokens), temperature=temperature, seed=_whole(seed), ignore_eos=ignore_eos
    )
    return Settings(generation, budget, tree)


def _whole(value: Any) -> Any:
    """Sliders hand over floats; what is not a whole number is left for the configs to refuse."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def build_load_controls() -> dict[str, Any]:
    """How much to load: budget and policy; the finer choices in a tab of their own."""
    with gr.Tab("How much to load"), gr.Row():
        lossless = gr.Checkbox(
            False, label="No budget", info="Lossless: every expert the router asks for.", min_width=130
        )
        # The ends are the loaded model's top-k and experts; `limits` sets them once it is there. 12 is the least on
        # the embedded model's frontier (assets/bench), with the paper's score, that loses less than two points of exact
        # match for sure and agrees on 97 % of next tokens.
        budget = gr.Slider(
            8, 64, value=12, step=1, label="Experts per layer", info="At most this many are read per step.", scale=3
        )
        policy = gr.Radio(
            [("substitute", "substitution"), ("truncate", "truncation")],
            value="substitution",
            label="A dropped expert's place",
            info="goes to a kept one, or is left empty",
            min_width=170,
            scale=2,
        )
    with gr.Tab("How experts are ranked"), gr.Row():
        score = gr.Radio(list(SCORES.items()), value="softmax", label="Score", info="What is summed over the tree.")
        row_weight = gr.Radio(list(ROW_WEIGHTS.items()), value="uniform", label="Weight of a row")
        protect_root = gr.Checkbox(
            False, label="Protect the root", info="Its token is already written: never take its experts."
        )
    return {
        "lossless": lossless,
        "budget": budget,
        "policy": policy,
        "score": score,
        "row_weight": row_weight,
        "protect_root": protect_root,
    }


def build_guess_controls() -> dict[str, Any]:
    """How far to guess: the draft tree. It starts as the engine's own default."""
    tree = TreeConfig()
    with gr.Tab("How far to guess"), gr.Row():
        total = gr.Slider(
            1, 32, value=tree.total_tokens, step=1, label="Tree size", info="Rows with the root; 1 guesses nothing."
        )
        depth = gr.Slider(1, 8, value=tree.depth, step=1, label="Depth", info="Levels below the root.")
        top_k = gr.Slider(1, 8, value=tree.top_k, step=1, label="Top-k", info="Guesses tried per node.")
        least = gr.Slider(
            0, 0.5, value=tree.min_path_p, step=0.01, label="Least likely path", info="Below this, no guess is kept."
        )
    return {"total_tokens": total, "depth": depth, "top_k": top_k, "min_path_p": least}


def build_write_controls() -> dict[str, Any]:
    """How to write: sampling, length, seed."""
    with gr.Tab("How to write"), gr.Row():
        temperature = gr.Slider(0, 1.5, value=0, step=0.1, label="Temperature", info="0 always takes the likeliest.")
        length = gr.Slider(16, 2048, value=192, step=16, label="Maximum new tokens", info="The answer ends there.")
        seed = gr.Number(0, precision=0, label="Seed", info="Same seed, same text.")
        ignore_eos = gr.Checkbox(False, label="Keep writing", info="Past its end, to watch for longer.")
    return {"temperature": temperature, "max_new_tokens": length, "seed": seed, "ignore_eos": ignore_eos}


def limits(info: EngineInfo, budget: float) -> gr.Slider:
    """The budget slider for the loaded model."""
    low, high = info.top_k, info.num_experts
    return gr.Slider(low, high, value=min(max(budget, low), high), step=1)
