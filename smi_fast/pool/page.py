"""One page of HTML about a pool, which needs no other file and no script."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from smi_fast.pool.files import PoolError, explained, write_content
from smi_fast.pool.layout import LOSS_CURVES, PAGE
from smi_fast.pool.metadata import Record, read_seconds
from smi_fast.pool.pictures import MOST_CLASSES, MOST_PER_CLASS, draw_loss
from smi_fast.pool.pool import Pool

BINS = 10
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; }}
section {{ display: inline-block; margin-right: 2em; vertical-align: top; }}
.curves {{ width: 460px; }}
figure {{ display: inline-block; margin: 0 1em 1em 0; }}
figcaption {{ color: #444; font-size: 13px; }}
figcaption.other {{ color: #d62728; }}
figure img {{ height: 112px; image-rendering: pixelated; }}
table {{ border-collapse: collapse; }}
td, th {{ border-bottom: 1px solid #ddd; padding: .2em 1em .2em 0; text-align: left; }}
td {{ overflow-wrap: anywhere; }}
rect {{ fill: #1f77b4; }}
text {{ font-size: 11px; text-anchor: middle; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def write_page(path: str | Path) -> Path:
    """Write ``report/index.html`` of a pool: images, histograms, loss, times, settings, versions.

    From a large pool it shows the first images of the first classes, as the contact sheet does.

    Args:
        path: folder of the pool.

    Returns:
        the file.

    Raises:
        PoolError: the pool is empty, an image can't be read, or the page can't be written.
    """
    pool = Pool(path)
    settings, records = pool.settings, pool.records
    if not records:
        raise PoolError(f"expected a pool of images, got an empty one in {pool.path}")
    draw_loss(pool)
    sections = [_summary(pool.path, records)]
    for key, who in (("confidence", "teacher"), ("judge_confidence", "judge")):
        values = [record[key] for record in records if _is_share(record.get(key))]
        if values:
            sections.append(f"<h2>Confidence of the {who}</h2>\n{_histogram(values)}")
    if (pool.path / LOSS_CURVES).exists():
        curves = _embedded(pool.path / LOSS_CURVES)
        image = f'<img class="curves" src="{curves}" alt="loss curves">'
        sections.append(f"<h2>Loss of the last batch</h2>\n{image}")
    sections += _classes(pool.path, records)
    sections = [f"<section>\n{section}\n</section>" for section in sections]
    made_with = {key: value for key, value in settings.items() if key != "class_names"}
    sections.append(f"<h2>Settings</h2>\n{_table(made_with)}")
    sections.append(f"<h2>Versions</h2>\n{_table(records[-1].get('versions', {}))}")
    title = escape(f"{len(records)} images in {pool.path.name or pool.path}")
    content = _PAGE.format(title=title, body="\n".join(sections)).encode()
    write_content(pool.path / PAGE, content)
    return pool.path / PAGE


def _summary(path: Path, records: Sequence[Record]) -> str:
    rows: dict[str, Any] = {"images": len(records)}
    rows["classes"] = len({record["label"] for record in records})
    kept = [len(record["kept"]) for record in records]
    mean = sum(kept) / len(kept)
    same = min(kept) == max(kept)
    rows["kept patches"] = kept[0] if same else f"{min(kept)} to {max(kept)}, mean {mean:.1f}"
    for key, wanted, name in (
        ("prediction", "label", "the teacher sees the wanted class"),
        ("judge", "class_name", "the judge sees the wanted class"),
    ):
        seen = [record[key] == record[wanted] for record in records if key in record]
        if seen:
            rows[name] = f"{sum(seen) / len(seen):.1%}"
    seconds = read_seconds(path)
    timed = sum(record["batch"] in seconds for record in records)
    if timed:
        rows["seconds of an image"] = f"{sum(seconds.values()) / timed:.3f}"
    return _table(rows)


def _table(rows: Mapping[str, Any]) -> str:
    lines = []
    for key, value in rows.items():
        text = value if isinstance(value, str) else json.dumps(value)
        lines.append(f"<tr><th>{escape(key)}</th><td>{escape(text)}</td></tr>")
    return "<table>\n" + "\n".join(lines) + "\n</table>"


def _is_share(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value <= 1


def _histogram(values: Sequence[float]) -> str:
    """Bars of the numbers of values in equal parts of [0, 1], as SVG."""
    counts = [0] * BINS
    for value in values:
        counts[min(int(value * BINS), BINS - 1)] += 1
    bars = []
    for i, count in enumerate(counts):
        height = 100 * count / max(counts)
        bars.append(
            f'<rect x="{50 * i + 5}" y="{120 - height:.1f}" width="40" height="{height:.1f}"/>'
        )
        bars.append(f'<text x="{50 * i + 25}" y="{115 - height:.1f}">{count}</text>')
        bars.append(f'<text x="{50 * i + 25}" y="135">{i / BINS:.1f}–{(i + 1) / BINS:.1f}</text>')
    return f'<svg width="{50 * BINS}" height="140" role="img">\n' + "\n".join(bars) + "\n</svg>"


def _classes(path: Path, records: Sequence[Record]) -> list[str]:
    """The first images of the first classes, whole and sparse, under what was seen in them."""
    classes: dict[int, list[Record]] = {}
    for record in records:
        classes.setdefault(record["label"], []).append(record)
    found = []
    for label in sorted(classes)[:MOST_CLASSES]:
        group = classes[label]
        name, shown = escape(group[0]["class_name"]), group[:MOST_PER_CLASS]
        figures = "\n".join(_figure(path, record) for record in shown)
        found.append(f"<h2>{name}: {len(shown)} of {len(group)} images</h2>\n{figures}")
    return found


def _figure(path: Path, record: Record) -> str:
    images = "".join(
        f'<img src="{_embedded(path / record[key])}" alt="{alt}">'
        for key, alt in (("file_name", "whole image"), ("masked_file_name", "kept patches"))
    )
    sure = record.get("confidence")
    words = [f"{sure:.1%}"] if _is_share(sure) else []
    other = "judge" in record and record["judge"] != record["class_name"]
    words += [str(record["judge"])] if "judge" in record else []
    mark = ' class="other"' if other else ""
    caption = escape(", ".join([f"image {record['index']}", *words]))
    return f"<figure>{images}<figcaption{mark}>{caption}</figcaption></figure>"


def _embedded(path: Path) -> str:
    with explained(f"reading {path}"):
        return f"data:image/png;base64,{b64encode(path.read_bytes()).decode()}"
