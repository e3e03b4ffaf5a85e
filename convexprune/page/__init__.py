"""The page about a run: what lies in its folder, checked as far as that goes without data, and shown."""
