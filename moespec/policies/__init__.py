"""Expert policies beside MoE-Spec, which is `moespec/budget.py`: the seam, the rivals, the yardsticks, their names."""
