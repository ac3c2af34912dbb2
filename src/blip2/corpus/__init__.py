"""Jobs on a whole corpus, shard by shard, on one machine or many."""
