"""Drafters: what proposes the tree. EAGLE-3 heads, prompt look-up, none."""
