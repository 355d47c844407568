"""Where the files of a pool lie.

A pool is a folder::

    settings.json            what the folder is, and the settings that decided the images
    metadata.jsonl           one line per image: its files and its record
    classes.txt              the folder of each class of the teacher, by index
    README.md                what is in the folder and how to load it
    images/0207/000000.png   the whole image, in the folder of its class
    masked/0207/000000.png   its kept patches, over the pool's background
    masks/0207/000000.png    one pixel per patch: 255 kept, 0 stopped
    report/loss.json         the loss of the last batch, in each iteration
    report/seconds.jsonl     how long each batch took
    report/progress/         moments of each image's inversion side by side, if they were kept
    parts/                   lines that the processes of a group have not put into the metadata yet
    .lock                    held by the process that adds images

The settings decide every byte of it but those of ``report/seconds.jsonl``.

All files of a line in the metadata exist, even if writing was interrupted. A file without a line
remains from an interrupted write; :meth:`Pool.resume` deletes it. ``format`` in the settings marks
the folder as a pool. Without it nothing there is deleted.
"""

from __future__ import annotations

FORMAT = "smi_fast pool 2"
SETTINGS = "settings.json"
METADATA = "metadata.jsonl"
CLASSES = "classes.txt"
CARD = "README.md"
LOCK = ".lock"
UNFINISHED = "unfinished"
PARTS = "parts"
CONTACT_SHEET = "report/contact_sheet.png"
LOSS = "report/loss.json"
LOSS_CURVES = "report/loss.png"
SECONDS = "report/seconds.jsonl"
PROGRESS = "report/progress"
PAGE = "report/index.html"
REPORTS = (CONTACT_SHEET, LOSS, LOSS_CURVES, SECONDS, PAGE)
# The folder of each of an image's files, by the entry of its record that names the file. Hugging
# Face's imagefolder knows a column of files by the ending of these names.
FOLDERS = {"file_name": "images", "masked_file_name": "masked", "mask_file_name": "masks"}


def class_folder(label: int, classes: int) -> str:
    """The folder of a class: its index, never its name, from which loaders may guess a split.

    >>> class_folder(207, classes=1000)
    '0207'

    Args:
        label: of the class.
        classes: number of the teacher's classes, which decides how many zeros are in front.
    """
    return f"{label:0{max(4, len(str(classes - 1)))}}"


def picture_name(index: int) -> str:
    """The file of an image in its folder.

    >>> picture_name(12)
    '000012.png'
    """
    return f"{index:06}.png"


def files_of(index: int, label: int, classes: int) -> dict[str, str]:
    """The files of an image, relative to the pool, by the entries of its record.

    >>> files_of(12, 207, classes=1000)["masked_file_name"]
    'masked/0207/000012.png'
    """
    where = f"{class_folder(label, classes)}/{picture_name(index)}"
    return {key: f"{folder}/{where}" for key, folder in FOLDERS.items()}
