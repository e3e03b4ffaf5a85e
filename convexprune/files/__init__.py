"""What is read from disk and written to it; nothing is ever unpickled."""
