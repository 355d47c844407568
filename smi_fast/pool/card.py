"""The dataset card of a pool: what is in the folder, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smi_fast.pool.layout import CARD, CLASSES, METADATA, SETTINGS, class_folder

_TEXT = """---
pretty_name: Images inverted by smi_fast
task_categories:
- image-classification
---
# Images inverted by smi_fast

Images that a frozen Vision Transformer takes for given classes, made from its weights alone. Their
labels are what was asked for: no person has looked at them.

| | |
|---|---|
| `images/` | whole images, in one folder for each class that has some |
| `masked/` | their kept patches, over {background} |
| `masks/` | one pixel for each patch: 255 kept, 0 stopped |
| `{metadata}` | a line for each image: its files, class, kept patches and provenance |
| `{classes}` | the folder of each of the {count} classes, by index |
| `{settings}` | what decided the images |
| `report/` | contact sheet, loss curves and times |

## Load it

```python
from datasets import load_dataset

load_dataset("POOL")["train"]  # image, masked, mask, label, class_name, kept, ...
```

```python
from torchvision.datasets import ImageFolder

images = ImageFolder("POOL/images")  # or POOL/masked
label = int(images.classes[images[0][1]])  # it numbers only the classes that have images
```

```sh
timm/train.py --data-dir POOL --train-split images --class-map POOL/{classes} --num-classes {count}
```

## Classes

{rows}
"""


def card(settings: Mapping[str, Any]) -> str:
    """The text of the card, in Markdown with the front matter of Hugging Face.

    Args:
        settings: of the pool.
    """
    background, names = settings["background"], settings["class_names"]
    shown = {
        "mean": "the mean colour of each image's kept patches",
        "blurred": "a blur of each image's kept patches",
        "black": "black",
    }
    rows = [
        f"- `{class_folder(label, len(names))}` {_one_line(name)}"
        for label, name in enumerate(names)
    ]
    return _TEXT.format(
        background=shown[background] if isinstance(background, str) else f"the colour {background}",
        metadata=METADATA,
        classes=CLASSES,
        settings=SETTINGS,
        count=len(names),
        rows="\n".join(rows),
    )


def descriptions(settings: Mapping[str, Any]) -> dict[str, bytes]:
    """The files that explain a pool to loaders and readers, by their names."""
    count = len(settings["class_names"])
    folders = "".join(f"{class_folder(label, count)}\n" for label in range(count))
    return {CLASSES: folders.encode(), CARD: card(settings).encode()}


def _one_line(name: str) -> str:
    return " ".join(name.split())
