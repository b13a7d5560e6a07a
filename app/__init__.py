"""The Gradio page. Imports moespec's public names only."""
