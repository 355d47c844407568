"""What mkdocs does besides: pictures of the benchmarks, tables made from the code, docstrings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import _backends
from mkdocs.structure.files import File, Files

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
TABLES = {"ops": _backends.ops, "on_gpu": _backends.on_gpu, "attention": _backends.attention}
# A reference to an object in a docstring, as :class:`SparseViT`, after Markdown.
ROLE = re.compile(r":(?:class|data|func|meth|mod):<code>([\w.]+)</code>")


def on_files(files: Files, *, config: Any) -> Files:
    """Shows the pages the recorded pictures, as ``pictures/NAME.png``."""
    for path in sorted(RESULTS.glob("*.png")):
        files.append(
            File.generated(config, f"pictures/{path.name}", abs_src_path=str(path)),
        )
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Puts each table in the place of its ``<!-- table: NAME -->``."""
    return re.sub(r"<!-- table: (\w+) -->", lambda found: "\n".join(TABLES[found[1]]()), markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Turns the roles of docstrings into links, where the reference has what they name."""
    html = ROLE.sub(r'<autoref optional identifier="\1"><code>\1</code></autoref>', html)
    return html.replace("::</p>", ":</p>")
