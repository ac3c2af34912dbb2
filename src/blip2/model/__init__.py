"""The networks of the paper: pure PyTorch on tensors, without files, data sets or the command line."""
