"""One self-contained HTML page about a run, from what lies in its folder."""

from convexprune.report.page.extras import save_extras
from convexprune.report.page.write import write_page

__all__ = ["save_extras", "write_page"]
