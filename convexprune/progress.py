"""What callers may be told while they wait."""

__all__ = ["silent"]


def silent(stage: str, done: int, total: int) -> None:
    """No progress is shown."""
