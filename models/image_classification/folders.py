"""A folder of images, {train,val}/{class}/**/*.{jpg,jpeg,png,bmp}, read as it is."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL import Image

from trunkline.engine.errors import DataError
from trunkline.models.image_classification.config import ImageData

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")


class Folders:
    """The source that is a folder."""

    def __init__(self, data: ImageData) -> None:
        self.root, self.img_size = Path(str(data.path)), data.img_size
        self.classes = tuple(
            sorted({path.name for split in ("train", "val") for path in (self.root / split).glob("*") if path.is_dir()})
        )
        self.fingerprint = hashlib.sha256(repr([str(data.path), data.img_size]).encode()).hexdigest()
        self.notes: list[str] = []

    def split(self, name: str) -> FolderImages:
        """The images of a split. Raises DataError if there are none."""
        return FolderImages(self, name)


class FolderImages:
    """The images of one split."""

    def __init__(self, source: Folders, split: str) -> None:
        self.source = source
        self.paths = sorted(p for p in (source.root / split).rglob("*") if p.suffix.lower() in SUFFIXES)
        if not self.paths:
            raise DataError(f"{source.root / split}: holds no image ({', '.join(SUFFIXES)})")
        names = [path.relative_to(source.root / split).parts[0] for path in self.paths]
        self.labels = np.array([source.classes.index(name) for name in names], np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, object]:
        edge = self.source.img_size
        with Image.open(self.paths[index]) as image:
            pixels = np.asarray(image.convert("RGB").resize((edge, edge), Image.Resampling.BILINEAR))
        return {"image": pixels, "label": int(self.labels[index]), "index": index}

    def name(self, index: int) -> str:
        """Its path below the data's folder."""
        return str(self.paths[index].relative_to(self.source.root))
