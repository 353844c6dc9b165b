"""The page of a report: HTML with its pictures inside."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path
from typing import Any

from .. import __version__

FILE = "report.html"
TEXTS = {
    "adversarial_share": ("Share of adversarial samples", "Of each class, the share of samples with epsilon > 0 in each epoch. Where it is high the training pulls the class towards the boundary; where it is low it lets the class go."),
    "epsilon": ("Epsilon by class", "Right of zero (orange): adversarial, the sample is moved towards the other classes, so that training pulls it back harder. Left (blue): anti-adversarial, training lets it go. A second hump on the left is often wrong labels. In brackets: samples."),
    "clean_and_wrong": ("Right and wrong labels", "The same for samples whose label is right, and whose label is known to be wrong. The further apart, the better epsilon tells them from each other."),
    "finding": ("Finding wrong labels", "Taking the samples with the highest suspicion, the lowest epsilon or the highest loss for wrong: precision against recall over all cut-offs."),
    "suspects": ("Suspect labels", "Samples that training lets go (low epsilon) and whose label the model contradicts, over the last epochs. Look at them before you change them: rare and hard samples look the same. Above each picture: row number, label, and what the model says. All samples are in samples.csv."),
    "wrong_labels": ("Wrong labels", "A list of which at most a tenth is right, on average, told by the trusted rows; on its page one can tick what one has looked at."),
    "drivers": ("What drives epsilon", "Left: how strongly each training characteristic moves epsilon (mean size of gradient x input over samples). Right: mean epsilon over samples when one characteristic is set to a value and the others stay as they are."),
    "spectra": ("Class covariances", "Eigenvalues of the feature covariance of classes (samples in brackets), largest first. A steep line: the class varies in few directions. Of a class with few samples the small ones are not known."),
    "confusion": ("Confusion matrices", "Rows are true classes, columns predictions, in percent of the row. In a Trainer's report \"warm-up\" is the last evaluation of the warm-up and \"Meta-IADA\" the last one of all: two moments of one run."),
    "class_accuracy": ("Accuracy of each class", "Test accuracy, with each model's worst class in the legend."),
    "group_accuracy": ("Accuracy of each group", "Test accuracy, with each model's worst group in the legend; rows of the group in brackets."),
    "meta_loss": ("Meta loss", "Cross-entropy on the meta batches, after the virtual step. It should fall, or stay low; a rise means that the model drifts away from what the meta set asks for."),
    "step_time": ("Time of a step", "Median and quartiles of the wall time from one optimizer step to the next, data loading included. Bars that are cut off had an interruption in them."),
}  # fmt: skip

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#222;max-width:60rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem}h2{font-size:1.2rem;margin:2.2rem 0 .3rem}p{margin:.3rem 0 .8rem;color:#444}
img{max-width:100%;height:auto}table{border-collapse:collapse;font-size:.85rem}
td,th{padding:.2rem .9rem .2rem 0;text-align:left;border-bottom:1px solid #ddd;vertical-align:top}
.wide td:not(:last-child),.wide th{white-space:nowrap}td:last-child{overflow-wrap:anywhere}
nav{font-size:.9rem}nav a{margin-right:.9rem;white-space:nowrap}.wide{overflow-x:auto}footer{margin:3rem 0;color:#777;font-size:.85rem}
"""


class Page:
    """Sections of :data:`TEXTS`; nothing is written before the end.

    Args:
        folder: to write to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: list[str] = []
        self.links: list[str] = []
        self.files: dict[str, bytes] = {}

    def facts(self, values: dict[str, str]) -> None:
        """A table of names and values."""
        rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in values.items())
        self.parts.append(f'<table id="facts">{rows}</table>')

    def section(
        self, key: str, figure: Any, cells: dict[str, list[Any]] | None = None, note: str = "", link: str = ""
    ) -> None:
        """A section with its picture, a table (columns by name), a note that goes first, and a link to another page."""
        title, text = TEXTS[key]
        self.links.append(f'<a href="#{key}">{title}</a>')
        parts = [f'<section id="{key}"><h2>{title}</h2><p>{text}</p>']
        if note:
            parts.append(f"<p><strong>{html.escape(note)}</strong></p>")
        if link:
            parts.append(f'<p><a href="{html.escape(link)}">{html.escape(link)}</a></p>')
        if figure is not None:
            buffer = io.BytesIO()
            figure.get_layout_engine().execute(figure)  # savefig would draw everything twice for it
            figure.set_layout_engine(None)
            figure.savefig(buffer, format="png")
            self.files[f"{key}.png"] = buffer.getvalue()
            data = base64.b64encode(buffer.getvalue()).decode()
            parts.append(f'<img alt="{title}" src="data:image/png;base64,{data}">')
        if cells:
            head = "".join(f"<th>{html.escape(k)}</th>" for k in cells)
            rows = zip(*cells.values(), strict=True)
            body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
            parts.append(f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>')
        self.parts.append("".join(parts) + "</section>")

    def file(self, name: str, content: bytes) -> None:
        """A further file beside the page."""
        self.files[name] = content

    def finish(self) -> None:
        """Write everything; pictures of an earlier report that this one does not have go."""
        title = "Meta-IADA report"
        page = (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1><nav>{' '.join(self.links)}</nav>"
            f"{''.join(self.parts)}<footer>Written by iada_plugin {__version__}.</footer></body></html>\n"
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        for key in TEXTS:
            if f"{key}.png" not in self.files:
                (self.folder / f"{key}.png").unlink(missing_ok=True)
        for name, content in {**self.files, FILE: page.encode(errors="replace")}.items():
            (self.folder / name).write_bytes(content)
