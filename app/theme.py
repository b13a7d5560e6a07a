"""The page's look: an instrument's. One accent colour, system fonts (nothing comes from elsewhere), tight spacing."""

from __future__ import annotations

import gradio as gr

CSS = """
#masthead h1 { font-size: 20px; font-weight: 650; margin: 0; display: inline; }
#masthead p { display: inline; margin: 0 0 0 12px; color: var(--body-text-color-subdued); }
#device p { font-size: 11px; color: var(--body-text-color-subdued); }
.slider_input_container input[type="range"] { min-width: 40px !important; flex: 1 1 auto; }
.gradio-container { padding-top: 10px !important; }
@media (max-width: 700px) { #masthead p { display: block; margin: 2px 0 0; } }
"""


def studio_theme() -> gr.themes.Base:
    """Light and dark from the same accent."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        secondary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        spacing_size=gr.themes.sizes.spacing_sm,
        radius_size=gr.themes.sizes.radius_sm,
        text_size=gr.themes.sizes.text_sm,
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "DejaVu Sans Mono", "monospace"],
    )
