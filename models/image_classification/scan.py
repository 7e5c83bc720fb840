"""What lies in a folder of images: ROOT/{train,val,test}/{class}/**/*.{jpg,jpeg,png,bmp}, the suffix in any case.

found = scan(root)
found.classes                      names, sorted over train/ and val/ together
found.images["train"]              {"train/cat/a/1.jpg": bytes of the file, ...}, sorted by name
found.notes                        what was passed over, in lines for a person to read

A class is a folder directly under train/ or val/; its images lie in it at any depth. test/ is optional. Links are
followed, but not in circles. Nothing is opened: trunkline.models.image_classification.decode says what a file holds.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trunkline.engine.errors import DataError, MissingDataError
from trunkline.engine.machine.reading import reason

SPLITS = ("train", "val", "test")
SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
_NEEDED = SPLITS[:2]
_SHOWN = 3
_NAMES_OF_VAL = ("valid", "validation", "dev", "test")
_LAYOUT = "the layout is ROOT/train/CLASS/... and ROOT/val/CLASS/..."


@dataclass(frozen=True)
class Found:
    """See the module."""

    classes: tuple[str, ...]
    images: Mapping[str, Mapping[str, int]]
    notes: Sequence[str]


def scan(root: Path, known: Sequence[str] = ()) -> Found:
    """Raises DataError for a folder without two classes, or with one to validate on that is not to train on.

    known: the classes of a trained network. Any of the splits will do then, and others are classes after these
    """
    passed = PassedOver()
    _check_root(root, bool(known))
    there = [split for split in SPLITS if (root / split).is_dir()]
    folders = {split: sorted(_class_folders(root, split, passed)) for split in there}
    images = {
        split: dict(sorted(item for folder in folders[split] for item in images_below(root, folder, passed)))
        for split in there
    }
    names = {class_of(folder) for split in there if known or split in _NEEDED for folder in folders[split]}
    classes = (*known, *sorted(names - set(known)))
    if not known:
        _check_classes(root, classes, images, passed)
    return Found(classes, images, passed.notes())


def class_of(name: str) -> str:
    """The class of an image, from its name below the root: "cat" of "train/cat/a/1.jpg"."""
    return name.split("/", 2)[1]


def shown(names: Sequence[str], most: int = _SHOWN) -> str:
    """The first few names, as they can be printed."""
    listed = ", ".join(printable(name) for name in names[:most])
    return f"{listed}, ..." if len(names) > most else listed


def printable(name: str) -> str:
    r"""A file's name, where bytes that are no UTF-8 read \xff."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


class PassedOver:
    """What lies in the folder and is no image of a class."""

    def __init__(self) -> None:
        self.hidden = 0
        self.loose: list[str] = []
        self.circles: list[str] = []
        self.others: defaultdict[str, list[str]] = defaultdict(list)

    def notes(self) -> list[str]:
        others = sorted(name for names in self.others.values() for name in names)
        counts = sorted(((len(names), suffix) for suffix, names in self.others.items()), reverse=True)
        suffixes = ", ".join(f"{suffix} ({count:,})" for count, suffix in counts[:5])
        lines = []
        if self.hidden:
            lines.append(f"{self.hidden:,} hidden files and folders are passed over")
        for names, why in (
            (others, f"files are passed over, which end in none of {', '.join(SUFFIXES)} but in {suffixes}"),
            (sorted(self.loose), "images are passed over, which lie in no class's folder"),
            (sorted(self.circles), "links are passed over, which lead back to a folder that they lie in"),
        ):
            if names:
                lines.append(f"{len(names):,} {why}: {shown(names)}")
        return lines


def _class_folders(root: Path, split: str, passed: PassedOver) -> Iterator[str]:
    for each in _entries(root, split):
        name = f"{split}/{each.name}"
        if _is_hidden(each.name):
            passed.hidden += 1
        elif each.is_dir():
            try:
                each.name.encode()
            except UnicodeEncodeError:
                raise DataError(f"{root}: {printable(name)}: a class's name must be UTF-8: rename the folder") from None
            yield name
        elif _suffix(each.name) in SUFFIXES:
            passed.loose.append(name)
        else:
            passed.others[_suffix(each.name)].append(name)


def images_below(root: Path, folder: str, passed: PassedOver) -> Iterator[tuple[str, int]]:
    """(name below `root`, bytes) of the images in a folder of it, at any depth. Raises DataError."""
    waiting = [(folder, frozenset({_identity(root / folder)}))]
    while waiting:
        folder, above = waiting.pop()
        for each in _entries(root, folder):
            name, suffix = f"{folder}/{each.name}", _suffix(each.name)
            if _is_hidden(each.name):
                passed.hidden += 1
            elif each.is_dir():
                identity = _identity(root / name)
                if identity in above:
                    passed.circles.append(name)
                else:
                    waiting.append((name, above | {identity}))
            elif suffix in SUFFIXES:
                yield name, _size(each)
            else:
                passed.others[suffix].append(name)


def _entries(root: Path, folder: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(root / folder) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(f"{root / folder}: cannot be read ({reason(error)}): check its permissions") from error


def _size(each: os.DirEntry[str]) -> int:
    try:
        return each.stat().st_size
    except OSError:  # a link that leads nowhere, which is named when it is opened
        return 0


def _identity(folder: Path) -> tuple[int, int]:
    found = folder.stat()
    return found.st_dev, found.st_ino


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower() or "no suffix"


def _check_root(root: Path, any_split: bool) -> None:
    if not root.is_dir():
        kind = DataError if root.exists() else MissingDataError
        raise kind(f"{root}: {'not a folder' if root.exists() else 'no such folder'}: {_LAYOUT}")
    missing = [split for split in _NEEDED if not (root / split).is_dir()]
    if not missing or (any_split and any((root / split).is_dir() for split in SPLITS)):
        return
    folders = sorted(each.name for each in _entries(root, "") if each.is_dir() and not _is_hidden(each.name))
    said = f"{root}: no folder {' and no folder '.join(missing)}"
    above = root.parent
    if root.name in SPLITS and (above / root.name).is_dir():
        if any_split:
            raise DataError(f"{said}: if its folders are the classes, give {above}, and --split {root.name}")
        if all((above / split).is_dir() for split in _NEEDED):
            raise DataError(f"{said}, but they lie in {above}: give that one")
    if missing == ["val"] and (others := [name for name in folders if name in _NAMES_OF_VAL]):
        raise DataError(f"{said}, but one called {others[0]}: rename it to val, if it is what to validate on")
    if missing == list(_NEEDED) and (
        classes := [name for name in folders if next(images_below(root, name, PassedOver()), None)]
    ):
        rest = f", and a part of each one's images into the same folders under {root / 'val'}"
        raise DataError(
            f"{said}, but folders with images, {shown(classes)}: if these are the classes, move them into "
            + (str(root / "test") if any_split else f"{root / 'train'}{rest}")
        )
    raise DataError(f"{said}{f', but {shown(folders)}' if folders else ''}: {_LAYOUT}")


def _check_classes(
    root: Path, classes: tuple[str, ...], images: Mapping[str, Mapping[str, int]], passed: PassedOver
) -> None:
    trained = {class_of(name) for name in images["train"]}
    for split in list(images)[1:]:
        if strange := sorted({class_of(name) for name in images[split]} - trained):
            raise DataError(
                f"{root / split}: {len(strange)} classes have no images in {root / 'train'}: {shown(strange)}: put "
                "some there, or remove these"
            )
    if len(trained) < 2:
        found = f"only one class with images, {trained.copy().pop()}" if trained else "no class with images"
        raise DataError("; ".join([f"{root / 'train'}: {found}, where two are needed: {_LAYOUT}", *passed.notes()]))
    if not images["val"]:
        raise DataError("; ".join([f"{root / 'val'}: no image in {len(classes)} classes: {_LAYOUT}", *passed.notes()]))
