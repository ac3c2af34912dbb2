"""Evaluation on held-out data: benchmark metrics and reports."""
