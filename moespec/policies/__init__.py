"""Expert policies: the interface, and the rivals of MoE-Spec behind it."""
