"""From what people have (files, tables, shards, data sets) to batches of tensors."""
