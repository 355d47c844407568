"""The page about a pool is whole HTML, needs no other file, and shows what the records say."""

from __future__ import annotations

import re
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from smi_fast.pool import Pool, PoolError
from smi_fast.pool.page import write_page
from smi_fast.pool.pictures import MOST_PER_CLASS
from tests.helpers.pools import SETTINGS, batch, files
from tests.helpers.smi import Smi

CLASSES = ["cat", "<script>alert(1)</script>", "dog & 'bird'"]
SEEN = ("cat", "cat", "dog & 'bird'")
VOID = {"meta", "img", "rect"}


class Page(HTMLParser):
    """Collects tags, text and pictures, and refuses tags that aren't closed in their order."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(path.read_text("utf-8"))
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip() and self.open:
            self.texts.append((self.open[-1], data.strip()))

    def of(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]


def a_pool(path: Path) -> Path:
    with Pool.create(path, SETTINGS, CLASSES) as pool:
        for seed in range(4):
            images, masks, records = batch(3, seed=seed)
            for i, record in enumerate(records):
                record |= {"confidence": (0.05, 0.95, 1.0)[i], "prediction": i if seed else 0}
                record |= {"judge": SEEN[i], "judge_confidence": 0.5, "versions": {"torch": "2.x"}}
            loss = {"stops": [1], "history": {"l": [1.0, 0.5]}}
            pool.add(images, masks, records, loss=loss, seconds=1.5)
    return path


def test_the_page_shows_the_pool(tmp_path: Path) -> None:
    pool = a_pool(tmp_path / "pool")
    path = write_page(pool)
    assert path == pool / "report/index.html"
    page = Page(path)
    assert page.of("h1") == ["12 images in pool"]
    headings = page.of("h2")
    assert [f"{name}: 4 of 4 images" for name in CLASSES] == headings[3:6]
    assert {"Settings", "Versions", "Loss of the last batch"} < set(headings)
    rows = dict(zip(page.of("th"), page.of("td"), strict=True))
    assert (
        rows["images"] == "12" and rows["classes"] == "3" and rows["seconds of an image"] == "0.500"
    )
    assert rows["the teacher sees the wanted class"] == "83.3%"
    assert rows["the judge sees the wanted class"] == "66.7%"
    assert (rows["torch"], rows["at"], rows["background"]) == ("2.x", "[50, 100]", "mean")
    pictures = [attributes["src"] or "" for tag, attributes in page.tags if tag == "img"]
    content = [b64decode(src.removeprefix("data:image/png;base64,")) for src in pictures]
    assert content[0] == (pool / "report/loss.png").read_bytes()
    expected = [
        (pool / record[key]).read_bytes()
        for record in sorted(Pool(pool).records, key=lambda record: record["label"])
        for key in ("file_name", "masked_file_name")
    ]
    assert content[1:] == expected
    captions = page.of("figcaption")
    assert captions[:5] == [*(f"image {i}, 5.0%, cat" for i in (0, 3, 6, 9)), "image 1, 95.0%, cat"]
    marked = [attrs for tag, attrs in page.tags if tag == "figcaption" and attrs]
    assert len(marked) == 4


def test_it_needs_no_other_file_and_no_script(tmp_path: Path) -> None:
    text = write_page(a_pool(tmp_path)).read_text("utf-8")
    assert "<script" not in text and "http" not in text and "<link" not in text
    sources = re.findall('(?:src|href)="([^"]{0,15})', text)
    assert sources and all(source.startswith("data:image/png") for source in sources)


def test_histograms_count_every_image(tmp_path: Path) -> None:
    page = Page(write_page(a_pool(tmp_path)))
    counts = [int(text) for text in page.of("text") if text.isdecimal()]
    assert counts == [4, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 12, 0, 0, 0, 0]
    heights = [float(attributes["height"] or 0) for tag, attributes in page.tags if tag == "rect"]
    assert heights[0] == 50 and heights[9] == heights[15] == 100


def test_a_pool_with_little_in_its_records(tmp_path: Path) -> None:
    images, masks, _ = batch(1)
    with Pool.create(tmp_path, SETTINGS, CLASSES) as pool:
        with pytest.raises(PoolError, match="expected a pool of images, got an empty one"):
            write_page(tmp_path)
        for _ in range(MOST_PER_CLASS + 1):
            pool.add(images, masks, [{"label": 2, "confidence": "sure"}])
    page = Page(write_page(tmp_path))
    most = f"{CLASSES[2]}: {MOST_PER_CLASS} of {MOST_PER_CLASS + 1} images"
    assert page.of("h2") == [most, "Settings", "Versions"]
    (tmp_path / "images/0002/000000.png").unlink()
    before = files(tmp_path)
    with pytest.raises(PoolError, match=r"reading .*images/0002/000000.png failed: No such file"):
        write_page(tmp_path)
    assert files(tmp_path) == before


def test_the_command(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    smi, pool = Smi(monkeypatch, capsys), a_pool(tmp_path)
    assert smi("report", pool) == (0, f"look at {pool / 'report/index.html'}\n", "")
    Pool.create(pool, SETTINGS, CLASSES, overwrite=True).close()
    assert not (pool / "report").exists()
