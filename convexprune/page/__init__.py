"""The page about a run: what lies in its folder, and what it buys, shown."""
