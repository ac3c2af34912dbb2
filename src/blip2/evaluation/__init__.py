"""Measuring what a model does on pictures it never saw, and showing it."""
