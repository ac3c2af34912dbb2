"""Search in a library of images: a shortlist by similarity (ITC), re-ranked by matching (ITM). See docs/search.md."""
