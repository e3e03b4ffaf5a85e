"""Pages about runs, read as a reader sees them."""

import re
from html import unescape
from pathlib import Path

from convexprune.page.page import write_page


def text_of(html: str) -> str:
    """Without tags, on one line."""
    return " ".join(unescape(re.sub(r"<[^>]*>", " ", html.split("<main>")[-1].split("<script>")[0])).split())


def table(html: str, caption: str) -> dict[str, dict[str, str]]:
    """By the first cell, by heading."""
    body = html.split(f"<caption>{caption}</caption>")[1].split("</table>")[0]
    rows = [re.findall(r"<t[hd]\b[^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in body.split("<tr>")[1:]]
    headings, *cells = [[text_of(cell) for cell in row] for row in rows]
    return {row[0]: dict(zip(headings, row, strict=True)) for row in cells}


def charts(html: str) -> list[str]:
    return [unescape(name) for name in re.findall(r'<img class="chart"[^>]* alt="([^"]*)"', html)]


def page_of(folder: Path, tmp_path: Path) -> str:
    return write_page(folder, tmp_path / "page.html").read_text(encoding="utf-8")
