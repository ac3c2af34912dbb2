"""Loading of data for training and evaluation: from files, tables, shards and data sets to batches of tensors."""
