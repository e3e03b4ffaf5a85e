"""A run's results in its folder: sealed, read again, and shown as a page."""
