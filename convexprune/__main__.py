"""``python -m convexprune`` is the command line."""

from convexprune.cli.app import app

if __name__ == "__main__":
    app(prog_name="python -m convexprune")
