"""What pruning did, as data, tables and a page."""
