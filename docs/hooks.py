"""Hooks of MkDocs."""

import re


def on_page_content(html: str, **_: object) -> str:
    """Remove the roles of reStructuredText (``:func:`load```), which Markdown shows as text."""
    return re.sub(r":(?:attr|class|command|data|func|meth|mod):(?=<code>)", "", html)
