"""Drafters: what proposes the tree. EAGLE-3 heads, small models, prompt look-up, none."""
