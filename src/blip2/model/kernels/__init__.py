"""Faster forms of plain formulas. Each function states the formula that it computes, and a test compares both.

``linear`` has matrix products, the two-layer MLP and a LayerNorm folded into a projection; ``sdpa`` attention;
``packing`` the layout of text without padding; ``dropout`` dropout; ``recompute`` gradient checkpointing.
"""
