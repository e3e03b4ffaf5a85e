"""Runs on disk: the journal of solved layers, fingerprints, resuming, verifying."""
