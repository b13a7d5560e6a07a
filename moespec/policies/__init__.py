"""Expert policies: the interface. MoE-Spec itself is `moespec/budget.py`."""
