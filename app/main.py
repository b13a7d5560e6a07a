"""Composes the page: a chat, its controls and a line of figures. Loads no model at import."""

from __future__ import annotations

import os
from collections.abc import Iterator

import gradio as gr

from app.service import Service
from moespec import BudgetConfig, GenerationConfig, StepTrace, TreeConfig

NUM_EXPERTS, TOP_K = 64, 8  # of the embedded model: the slider's ends
EXAMPLES = ["What is 12 + 30?", "Tell me a short story.", "What does river mean?", "I want to book a table for two."]
WAITING = "Figures of the answer will appear here: speed, experts read per layer, lossless or lossy."


def build_app(service: Service) -> gr.Blocks:
    """The page for a service."""
    with gr.Blocks(title="MoE-Spec Studio", analytics_enabled=False) as page:
        gr.Markdown("## MoE-Spec Studio\nSpeculative decoding of a small Mixture-of-Experts under an expert budget.")
        with gr.Row():
            with gr.Column(scale=3):
                chat = gr.Chatbot(label="Chat", height=420)
                prompt = gr.Textbox(label="Message", placeholder="Write something and press Enter", autofocus=True)
                gr.Examples(EXAMPLES, prompt)
                figures = gr.Markdown(WAITING)
            with gr.Column(scale=1):
                budget = gr.Slider(
                    TOP_K, NUM_EXPERTS, value=NUM_EXPERTS, step=1, label="Experts per layer (64 is lossless)"
                )
                policy = gr.Radio(["substitution", "truncation"], value="substitution", label="Policy")
                total = gr.Slider(1, 32, value=8, step=1, label="Tree size")
                temperature = gr.Slider(0, 1.5, value=0, step=0.1, label="Temperature")
                length = gr.Slider(16, 512, value=128, step=16, label="Maximum new tokens")
                stop, clear = gr.Button("Stop"), gr.Button("Clear")

        def answer(
            text: str, history: list, experts: int, how: str, rows: int, heat: float, limit: int, request: gr.Request
        ) -> Iterator[tuple]:
            if not text.strip():
                raise gr.Error("Write something first: the message is empty.", print_exception=False)
            messages = [*_plain(history), {"role": "user", "content": text}]
            answered = {"role": "assistant", "content": ""}
            yield "", [*messages, answered], "Reading the prompt…"
            generation = GenerationConfig(max_new_tokens=int(limit), temperature=heat)
            try:
                stream = service.stream(
                    request.session_hash, messages, generation, _budget(experts, how), TreeConfig(int(rows))
                )
                for steps in stream:
                    answered["content"] += "".join(step.text for step in steps)
                    yield "", [*messages, answered], _figures(steps[-1])
            except ValueError as error:
                raise gr.Error(str(error), print_exception=False) from error

        inputs = [prompt, chat, budget, policy, total, temperature, length]
        prompt.submit(answer, inputs, [prompt, chat, figures], concurrency_limit=1, concurrency_id="engine")

        def move(experts: int, how: str, request: gr.Request) -> None:
            service.update(request.session_hash, _budget(experts, how))

        gr.on([budget.change, policy.change], move, [budget, policy], None, queue=False, show_progress="hidden")

        def halt(request: gr.Request) -> None:
            service.stop(request.session_hash)

        stop.click(halt, None, None, queue=False)
        clear.click(lambda: ([], WAITING), None, [chat, figures])
    return page


def _budget(experts: int, policy: str) -> BudgetConfig:
    return BudgetConfig(budget=None if experts >= NUM_EXPERTS else int(experts), policy=policy)


def _plain(history: list) -> list[dict]:
    """Gradio's messages as role and text."""
    messages = []
    for message in history:
        content = message["content"]
        text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        messages.append({"role": message["role"], "content": text})
    return messages


def _figures(step: StepTrace) -> str:
    if step.summary is None:
        kept = "all" if step.settings.effective_budget is None else f"at most {step.settings.effective_budget}"
        return f"step {step.step} · {kept} experts per layer · {'lossless' if step.lossless else 'lossy'}"
    summary = step.summary
    experts = ""
    if summary.experts_natural is not None:
        experts = f"experts per layer {summary.experts_natural:.1f} natural, {summary.experts_active:.1f} read · "
    return (
        f"{summary.tokens_per_s:.0f} tokens/s · {summary.tokens_per_step:.2f} tokens per step · {experts}"
        f"router mass kept {summary.mass_kept:.3f} · {'lossless' if summary.lossless else 'lossy'} · "
        f"{summary.device['name']}"
    )


def launch() -> None:
    """Serve the page: on every interface in a Space, on this machine alone otherwise."""
    host = os.environ.get("HOST", "0.0.0.0" if "SPACE_ID" in os.environ else "127.0.0.1")
    page = build_app(Service())
    page.queue(max_size=16, api_open=False)
    page.launch(server_name=host, server_port=int(os.environ.get("PORT", "7860")), footer_links=[], run_history=False)
