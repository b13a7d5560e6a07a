"""The page's look: an instrument's. One accent colour, system fonts (nothing comes from elsewhere), tight spacing."""

from __future__ import annotations

import gradio as gr

CSS = """
.dark { --color-accent: var(--primary-500); }
.gradio-container > .main { padding-top: 8px !important; gap: 8px; }
#masthead h1 { font-size: 18px; font-weight: 650; margin: 0; display: inline; }
#masthead p { display: inline; margin: 0 0 0 12px; color: var(--body-text-color-subdued); }
#device p, #advice p, #preset-help p, #replay-hint p { font-size: 11px; color: var(--body-text-color-subdued); }
#advice p, #preset-help p { margin: 0; }
#advice-row { flex-wrap: nowrap; align-items: center; gap: 8px; }
#use-advice { flex: none !important; min-width: 0 !important; align-self: center; padding: 2px 10px; }
#send, #stop { align-self: stretch; font-weight: 600; }
/* Each is only ever hidden: Gradio repeats every rule under a prefix, to which a rule that shows it would lose. */
body:is([data-answer="waiting"], [data-answer="writing"]) #send { display: none; }
body:not([data-answer="waiting"], [data-answer="writing"]) #stop { display: none; }
#examples .gallery, #examples .gallery > * { flex-wrap: nowrap; }
#examples .gallery { overflow-x: auto; padding-bottom: 4px; }
#examples .gallery button { white-space: nowrap; flex: none; }
#examples > .label { display: none; }
#preset-row { align-items: center; gap: 4px 12px; }
#preset { flex: 0 1 auto; width: auto; min-width: 0 !important; }
#preset-help { flex: 1 1 180px; min-width: 180px !important; }
#preset label { padding: 3px 8px; }
/* The conversation's buttons lie over its corner: it scrolls below them. */
#chat .bubble-wrap { margin-top: 34px; height: calc(100% - 34px); }
/* A long choice ends before the arrow. */
input[role="combobox"] { text-overflow: ellipsis; padding-right: 30px !important; }
/* A checkbox has no width of its own: its name would be cut off. */
.tick { min-width: min(130px, 100%) !important; }
.reset { align-self: flex-start; width: auto !important; flex: none; font-weight: 400; }
.slider_input_container input[type="range"] { min-width: 40px !important; flex: 1 1 auto; }
#frontier-plot, #sweep-plot, #calculator-plot { min-height: 440px; }
.about-part { align-items: flex-start; }
.prose table { word-break: normal; overflow-wrap: normal; }
.prose h2 { font-size: 16px; }
@media (max-width: 700px) {
  #talk { display: contents; }
  #talk > *, #panels { flex: 1 1 100%; width: 100%; max-width: 100%; min-width: 0 !important; }
  #panels { order: 1; }
  #knobs { order: 2; }
  #masthead p { display: block; margin: 2px 0 0; }
  .about-part { flex-direction: column; }
  .about-part > * { width: 100%; }
  .prose table { display: block; overflow-x: auto; max-width: 100%; }
  .tab-container button { padding: 6px 5px; font-size: 11.5px; }
}
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
    ).set(
        # The theme's own greys are too pale for small text (WCAG AA asks for 4.5 : 1).
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_label_text_color_dark="*neutral_200",
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        color_accent="*primary_700",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        # And so is its accent below white text.
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_800",
    )
