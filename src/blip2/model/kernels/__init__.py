"""Faster implementations of plain formulas. Docstrings state the formulas, and tests compare both results.

``linear``: linear layers, the two-layer MLP, and a LayerNorm folded into a projection. ``sdpa``: attention.
``packing``: the layout of text without padding. ``dropout``: dropout. ``recompute``: gradient checkpointing.
"""
