"""One self-contained HTML page from text, tables and pictures, and the small pictures it is made of."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #8886; }
figure { margin: 1rem 0; } figure img { max-width: 100%; border: 1px solid #8884; }
figcaption, .note { color: #888; font-size: .9rem; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #8884; text-align: right; }
td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
.scroll { overflow-x: auto; } .absent { color: #d33; font-weight: 600; text-decoration: underline wavy; }
code { background: #8882; padding: 0 .25em; border-radius: 3px; }
"""


class Page:
    """A page that is written once: sections, paragraphs, tables and figures in the order they were added."""

    def __init__(self, title: str, lead: str) -> None:
        self._title = title
        self._parts = [f"<h1>{html.escape(title)}</h1>", f"<p>{html.escape(lead)}</p>"]

    def section(self, title: str, text: str = "") -> None:
        """A heading with an opening paragraph."""
        self._parts.append(f"<h2>{html.escape(title)}</h2>")
        if text:
            self.text(text)

    def text(self, text: str, note: bool = False) -> None:
        """A paragraph of plain text."""
        self._parts.append(f"<p{' class=note' if note else ''}>{html.escape(text)}</p>")

    def markup(self, text: str) -> None:
        """A paragraph whose parts the caller has already escaped."""
        self._parts.append(f"<p>{text}</p>")

    def table(self, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
        """A table; cells are shown with str()."""
        head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
        self._parts.append(f"<div class=scroll><table><tr>{head}</tr>{body}</table></div>")

    def figure(self, image: Image.Image, caption: str) -> None:
        """A picture, stored inside the page."""
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        data = base64.b64encode(buffer.getvalue()).decode()
        text = html.escape(caption)
        alt = html.escape(caption, quote=True)
        self._parts.append(
            f'<figure><img alt="{alt}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'
        )

    def write(self, path: Path) -> Path:
        """Write the page and return its path."""
        body = "\n".join(self._parts)
        path.write_text(
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(self._title)}</title>'
            f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>\n'
            f"<body>{body}</body></html>",
            encoding="utf-8",
        )
        return path


def heat(image: Image.Image, values: np.ndarray, strength: float = 0.75) -> Image.Image:
    """`image`, greyed, under a heat map of `values` [H, W]: dark to yellow from the 2nd to the 98th percentile.

    values: any range; resized bilinearly to the image.
    """
    low, high = np.quantile(values, (0.02, 0.98))
    scaled = ((values - low) / (high - low)).clip(0, 1) if high > low else np.zeros_like(values)
    resized = Image.fromarray((scaled * 255).astype(np.uint8)).resize(image.size, Image.Resampling.BILINEAR)
    level = np.asarray(resized, np.float32)[..., None] / 255
    colour = np.concatenate([255 * np.sqrt(level), 220 * level**1.5, 90 * (1 - level)], axis=-1)
    grey = np.asarray(image.convert("L"), np.float32)[..., None]
    return Image.fromarray((grey * (1 - strength) + colour * strength).clip(0, 255).astype(np.uint8))


def grid(
    rows: Sequence[Sequence[Image.Image]], labels: Sequence[str], columns: Sequence[str], cell: int
) -> Image.Image:
    """Pictures in rows with a label beside each row and one above each column, cells `cell` pixels wide.

    Aspect ratios are kept; the first picture sets the height of its row.
    """
    font = ImageFont.load_default(size=14)
    gap = 6
    left = max((int(font.getlength(text)) for text in labels), default=0) + 2 * gap
    top = 22 if columns else gap
    heights = [round(row[0].height * cell / row[0].width) for row in rows]
    width = left + max(len(row) for row in rows) * (cell + gap)
    sheet = Image.new("RGB", (width, top + sum(heights) + gap * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, text in enumerate(columns):
        draw.text((left + i * (cell + gap), 3), text, fill="black", font=font)
    y = top
    for row, label, height in zip(rows, labels, heights):
        draw.text((gap, y + height // 2 - 8), label, fill="black", font=font)
        for i, image in enumerate(row):
            sheet.paste(
                image.convert("RGB").resize((cell, height), Image.Resampling.NEAREST), (left + i * (cell + gap), y)
            )
        y += height + gap
    return sheet
