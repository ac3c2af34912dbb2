"""``blip2 demo``: both stages on images with real frozen models, and a page that shows what was learned."""
