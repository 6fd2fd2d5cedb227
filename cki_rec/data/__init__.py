"""Raw files -> encoded data set -> batches."""
