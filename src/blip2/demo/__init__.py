"""``blip2 demo``: train both stages with small frozen models, and report what they learned."""
