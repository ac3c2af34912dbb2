"""Passes over a whole corpus, shard by shard, on one machine or on many."""
