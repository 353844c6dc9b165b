"""The page of a list of wrong labels: one HTML file on which a person ticks what was looked at, and a CSV of all rows."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..runtime.samples import content_of

FILE, TABLE = "wrong_labels.html", "wrong_labels.csv"
#: Levels to choose from on the page.
LEVELS = (0.05, 0.1, 0.2)
#: Longer side of a picture on the page.
_PIXELS = 96
_TEXT = 600
_BINS = 20
#: Above so many classes the transition matrix is a list of its largest entries.
_MANY = 20

_STYLE = """
:root{color-scheme:light dark;--ink:#222;--soft:#666;--line:#ddd;--bar:#0072b2;--bad:#d55e00;--good:#007a5a;--card:#fff;--page:#f6f6f4}
@media(prefers-color-scheme:dark){:root{--ink:#e6e6e6;--soft:#a0a0a0;--line:#3a3a3a;--bar:#56b4e9;--bad:#ff9a4d;--good:#5cd6a8;--card:#1f1f1f;--page:#151515}}
body{font:16px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:64rem;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin:0}h2{font-size:1.15rem;margin:2rem 0 .3rem}p{margin:.3rem 0 .7rem;color:var(--soft)}strong{color:var(--ink)}
table{border-collapse:collapse;font-size:.85rem}td,th{padding:.2rem .9rem .2rem 0;text-align:left;border-bottom:1px solid var(--line)}
#transition td,#transition th{padding:.2rem .45rem;text-align:right;border:0}.wide{overflow-x:auto}
#bar{position:sticky;top:0;z-index:1;background:var(--page);padding:.6rem 0;border-bottom:1px solid var(--line);display:flex;gap:1rem;flex-wrap:wrap;align-items:center}
button,select{font:inherit;font-size:.85rem;color:var(--ink);background:var(--card);border:1px solid var(--line);border-radius:.3rem;padding:.15rem .6rem;cursor:pointer}
.row{display:grid;grid-template-columns:6.5rem 1fr auto;gap:.9rem;align-items:center;background:var(--card);border:1px solid var(--line);border-radius:.4rem;padding:.5rem .8rem;margin:.4rem 0;content-visibility:auto;contain-intrinsic-size:auto 6rem}
.row img{width:6rem;height:6rem;object-fit:contain;image-rendering:pixelated;background:var(--page)}.row.text{grid-template-columns:1fr auto}
.row .what{overflow-wrap:anywhere}.row small{color:var(--soft)}.row .from{color:var(--bad);font-weight:600}.row .to{color:var(--good);font-weight:600}
.row.right{border-left:.35rem solid var(--good)}.row.wrong{border-left:.35rem solid var(--bad)}.row .acts{display:flex;flex-direction:column;gap:.3rem}
.on{outline:2px solid var(--bar)}svg text{fill:var(--soft);font-size:11px}footer{margin:3rem 0;color:var(--soft);font-size:.85rem}
"""

_SCRIPT = """
const key='wrong labels '+DATA.id, done=JSON.parse(localStorage.getItem(key)||'{}'), rows=[...document.querySelectorAll('.row')];
function paint(r){const d=done[r.dataset.row];r.classList.toggle('right',d==='right');r.classList.toggle('wrong',!!d&&d!=='right');
 r.querySelector('.ok').classList.toggle('on',d==='right');r.querySelector('.bad').classList.toggle('on',!!d&&d!=='right');}
function count(){const n=Object.keys(done).length;document.getElementById('count').textContent=n+' looked at, '+Object.values(done).filter(d=>d!=='right').length+' of them wrong'}
function set(r,d){const row=r.dataset.row;if(done[row]===d)delete done[row];else done[row]=d;localStorage.setItem(key,JSON.stringify(done));paint(r);count()}
function fill(s,r){if(s.length>1)return;const v=s.value;s.length=0;DATA.names.forEach((n,i)=>{if(i!=r.dataset.label)s.add(new Option(n,i))});s.value=v}
for(const r of rows){const s=r.querySelector('select'),d=done[r.dataset.row];const v=d&&d!=='right'?d:r.dataset.to;s.add(new Option(DATA.names[v],v));
 s.onfocus=s.onpointerdown=()=>fill(s,r);
 r.querySelector('.ok').onclick=()=>set(r,'right');r.querySelector('.bad').onclick=()=>set(r,s.value);
 s.onchange=()=>{delete done[r.dataset.row];set(r,s.value)};paint(r)}
function level(k){rows.forEach(r=>r.hidden=k>=0&&+r.dataset.level>k);const n=k<0?rows.length:DATA.sizes[k];
 document.getElementById('shown').textContent=k<0?'the '+rows.length+' most suspect rows, on a list or not':n+' rows on the list at '+DATA.levels[k]+' % false alarms'+(n>rows.length?' (the first '+rows.length+' are shown)':'');
 document.querySelectorAll('#bar [data-k]').forEach(b=>b.classList.toggle('on',b.dataset.k==k))}
document.querySelectorAll('#bar [data-k]').forEach(b=>b.onclick=()=>level(+b.dataset.k));
document.getElementById('save').onclick=()=>{const lines=['row,label,decision,new_label'];
 for(const[row,d]of Object.entries(done)){const r=document.querySelector('.row[data-row="'+row+'"]');if(r)lines.push([row,r.dataset.label,d==='right'?'right':'wrong',d==='right'?r.dataset.label:d].join(','))}
 const a=document.createElement('a');a.href=URL.createObjectURL(new Blob([lines.join('\\n')+'\\n'],{type:'text/csv'}));a.download='decisions.csv';a.click()};
count();level(DATA.start);
"""


def write_page(found: Any, folder: Path, *, samples: Any, title: str, limit: int) -> Path:
    """See :meth:`WrongLabels.write`, of which ``found`` is."""
    shown = found.order[:limit]
    lists = [found.at(level) for level in LEVELS]
    # The first of the levels at which a row is listed: those of a higher one are listed, too.
    first = np.sum([~one.listed for one in lists], axis=0)
    start = next((k for k, one in enumerate(lists) if one.false_alarms == found.false_alarms), len(LEVELS) - 1)
    data = {
        "id": f"{title} {len(found.label)} {float(np.nansum(found.margin)):.3f}",
        "names": found.class_names,
        "levels": [round(100 * level) for level in LEVELS],
        "sizes": [len(one) for one in lists],
        "start": start if len(lists[start]) else -1,
    }
    buttons = "".join(
        f'<button data-k="{k}">{100 * v:g} %: {len(o)}</button>'
        for k, (v, o) in enumerate(zip(LEVELS, lists, strict=True))
    )
    body = [
        f"<h1>{html.escape(title)}</h1><p><strong>{html.escape(str(found))}.</strong></p>",
        _facts(found),
        "<h2>P-values</h2><p>A right label is as likely in any bar, below the line on average. What stands out on the left are wrong"
        " labels.</p>" + _histogram(found),
        "<h2>The list</h2><p>The most suspect first. On average over draws of the trusted rows at most the given share of a list is"
        " right. Look before you change: of a hard or rare sample the label may be right.</p>",
        f'<div id="bar"><span>False alarms at most</span>{buttons}<button data-k="-1">all shown</button><span id="count"></span>'
        '<button id="save">Export decisions (CSV)</button></div><p id="shown"></p>',
        *(_row(found, int(row), int(first[row]), samples) for row in shown),
        "<h2>By class</h2>" + _classes(found),
        "<h2>What is taken for what</h2>" + _transition(found),
    ]
    text = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(body)}<footer>Written by iada_plugin"
        f" {__version__}. All rows are in {TABLE}.</footer><script>const DATA={_json(data)};{_SCRIPT}</script></body></html>\n"
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TABLE).write_text(table_csv(found), encoding="utf-8")
    (folder / FILE).write_bytes(text.encode(errors="replace"))
    return folder / FILE


def table_csv(found: Any) -> str:
    """All rows, in the order of ``ranking``."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    columns = found.columns()
    writer.writerow(["row", *columns, "label_name", "suggested_name"])
    for row in found.ranking.tolist():
        values = [v[row].item() for v in columns.values()]
        names = [found.class_names[found.label[row]], found.class_names[found.suggested[row]]]
        writer.writerow([row, *(f"{v:.6g}" if isinstance(v, float) else int(v) for v in values), *names])
    return buffer.getvalue()


def _json(data: Any) -> str:
    return json.dumps(data).replace("<", "\\u003c")  # no </script> in a class name


def _percent(value: float) -> str:
    return "not known" if np.isnan(value) else f"{100 * value:.1f} %"


def _table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    head = "".join(f"<th>{html.escape(h)}</th>" for h in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(str(c))}</td>" for c in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _facts(found: Any) -> str:
    share = found.wrong_share
    how = {
        "pooled": "with all trusted rows",
        "weighted": "with all trusted rows, weighted by the classes' shares of the data",
        "class": "with the trusted rows of its class",
    }[found.compared]
    if found.pooled_classes:
        how += "; these have too few and are compared together: " + ", ".join(
            found.class_names[c] for c in found.pooled_classes
        )
    facts = {
        "Rows": f"{len(found.label):,}, of which {int(found.trusted.sum()):,} trusted, and {int((found.checked & ~found.trusted).sum()):,} more looked at before",
        "Share of wrong labels": f"about {_percent(share.estimate)}, 90 % interval {_percent(share.low)} to {_percent(share.high)}; wrong"
        " labels that look right are not in it",
        "Compared": f"each label {how}",
        "Least to list": f"{_percent(found.share_needed)} of the rows must be as extreme before anything is listed at"
        f" {100 * found.false_alarms:g} %: more trusted rows lower it",
    }
    return "<table>" + "".join(f"<tr><th>{k}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items()) + "</table>"


def _histogram(found: Any) -> str:
    p = found.p_value[~found.checked]
    counts = np.histogram(p, _BINS, (0, 1))[0]
    share = found.wrong_share.estimate
    line = len(p) * (1 - (0 if np.isnan(share) else share)) / _BINS
    top = max(counts.max(initial=1), line) * 1.05
    width, height = 640, 150
    bars = "".join(
        f'<rect x="{30 + k * width / _BINS:.1f}" y="{height * (1 - c / top):.1f}" width="{width / _BINS - 2:.1f}"'
        f' height="{height * c / top:.1f}" fill="var(--bar)"><title>{c}</title></rect>'
        for k, c in enumerate(counts)
    )
    y = height * (1 - line / top)
    ticks = "".join(
        f'<text x="{30 + t * width:.0f}" y="{height + 16}" text-anchor="middle">{t:g}</text>'
        for t in (0, 0.25, 0.5, 0.75, 1)
    )
    return (
        f'<svg viewBox="0 0 {width + 60} {height + 22}" width="100%" role="img" aria-label="histogram of p-values">{bars}'
        f'<line x1="30" x2="{30 + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--bad)" stroke-dasharray="5 4"/>{ticks}</svg>'
    )


def _row(found: Any, row: int, level: int, samples: Any) -> str:
    content = None if samples is None else content_of(samples, row)
    label, other = int(found.label[row]), int(found.suggested[row])
    names = [html.escape(found.class_names[c]) for c in (label, other)]
    text, picture = "", ""
    if isinstance(content, str):
        text = f"<div>{html.escape(content if len(content) <= _TEXT else content[: _TEXT - 1] + '…')}</div>"
    elif content is not None:
        picture = f'<img alt="row {row}" loading="lazy" src="data:image/png;base64,{_png(content)}">'
    listed = f"listed at {100 * LEVELS[level]:g} %" if level < len(LEVELS) else "not listed"
    return (
        f'<div class="row{"" if picture else " text"}" data-row="{row}" data-label="{label}" data-to="{other}" data-level="{level}">{picture}'
        f'<div class="what"><span class="from">{names[0]}</span> → <span class="to">{names[1]}</span>?'
        f" <small>row {row}, p = {found.p_value[row]:.4f}, {listed}</small>{text}</div>"
        '<div class="acts"><button class="ok">label is right</button><button class="bad">wrong, it is</button><select></select></div></div>'
    )


def _png(image: np.ndarray) -> str:
    from PIL import Image

    picture = Image.fromarray((image * 255).round().astype(np.uint8))
    picture.thumbnail((_PIXELS, _PIXELS))
    buffer = io.BytesIO()
    picture.save(buffer, format="png")
    return base64.b64encode(buffer.getvalue()).decode()


def _classes(found: Any) -> str:
    rows = []
    for c, share in enumerate(found.class_wrong_shares):
        own = found.label == c
        if own.any():
            trusted = int((own & found.trusted).sum())
            interval = "" if np.isnan(share.estimate) else f"{_percent(share.low)} to {_percent(share.high)}"
            cells = (
                found.class_names[c],
                int(own.sum()),
                trusted,
                int((own & found.listed).sum()),
                _percent(share.estimate),
                interval,
            )
            rows.append((share.estimate if share.estimate == share.estimate else -1, cells))
    rows.sort(key=lambda r: -r[0])
    header = ("label", "rows", "trusted", f"listed at {100 * found.false_alarms:g} %", "wrong, about", "90 % interval")
    return _table(header, (cells for _, cells in rows))


def _transition(found: Any) -> str:
    matrix = found.transition
    if matrix is None:
        return "<p>Too many classes to estimate it.</p>"
    names = found.class_names
    note = (
        "<p>Of the samples of each true class (row), the estimated share that carries each label (column). Where predictions are of a"
        " network that was trained on the same rows, it hides what was learned by heart.</p>"
    )
    if len(names) > _MANY:
        off = matrix - np.diag(np.diag(matrix))
        largest = np.argsort(-off, axis=None)[:_MANY]
        pairs = [(int(k) // len(names), int(k) % len(names)) for k in largest]
        return note + _table(
            ("true class", "carries the label", "share"),
            ((names[i], names[j], _percent(matrix[i, j])) for i, j in pairs),
        )
    head = "<th></th>" + "".join(f"<th>{html.escape(n[:12])}</th>" for n in names)
    body = ""
    for i, line in enumerate(matrix):
        cells = "".join(
            f'<td style="background:color-mix(in srgb,var({"--good" if i == j else "--bad"}) {round(60 * v)}%,transparent)">'
            f"{round(100 * v) if v >= 0.005 else ''}</td>"
            for j, v in enumerate(line)
        )
        body += f"<tr><th>{html.escape(names[i])}</th>{cells}</tr>"
    return f'{note}<div class="wide"><table id="transition"><tr>{head}</tr>{body}</table></div>'
