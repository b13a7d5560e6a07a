"""Triton kernels for verifying a draft tree under an expert budget, and their plain reference.

Keep this file empty of work: transformers may import the package while it is itself being imported.
"""
