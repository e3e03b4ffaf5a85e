"""What pruning did, as data and tables."""
