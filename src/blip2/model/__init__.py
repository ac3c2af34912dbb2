"""The networks of the paper: pure PyTorch on tensors, nothing here knows files, data sets or the command line."""
