"""What callers may be told while they wait."""


def silent(stage: str, done: int, total: int) -> None:
    """No progress is shown."""
