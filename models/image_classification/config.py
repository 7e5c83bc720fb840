"""The `data` and `model` sections of an image classifier's configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from trunkline.engine.config.meaning import FolderPath
from trunkline.engine.config.strict import Strict, nearest
from trunkline.models.image_classification.architectures import ARCHITECTURES

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Channels = tuple[float, float, float]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Crop(Strict):
    """A random part of the image, resized to the square: its share of the area, and its width over its height."""

    scale: tuple[Share, Share] = Field((0.08, 1.0), description="share of the image's area, from and to")
    ratio: tuple[float, float] = Field((3 / 4, 4 / 3), description="width over height, from and to")

    @model_validator(mode="after")
    def _rising(self) -> Crop:
        for name, (low, high) in (("scale", self.scale), ("ratio", self.ratio)):
            if not 0 < low <= high:
                raise ValueError(f"'{name}' is from {low:g} to {high:g}: give a number above 0, then no lower one")
        return self


class Augmentation(Strict):
    """What training does to an image, drawn anew in each epoch."""

    flip: float = Field(0.5, ge=0, le=1, description="probability of a horizontal flip")
    rotate: float = Field(5.0, ge=0, le=180, description="degrees, at most, to either side")
    brightness: float = Field(0.1, ge=0, le=1, description="factor between 1 - b and 1 + b; so are the next two")
    contrast: float = Field(0.1, ge=0, le=1, description="factor between 1 - c and 1 + c")
    saturation: float = Field(0.1, ge=0, le=1, description="factor between 1 - s and 1 + s")
    hue: float = Field(0.05, ge=0, le=0.5, description="turns of the colour circle, at most, to either side")
    crop: Crop | None = Field(None, description="a random part; the whole image if null")
    mixup: float = Field(0.0, ge=0, description="alpha of the Beta distribution of the share; 0: none")


class ImageData(Strict):
    """Where the images are, and what of them is used."""

    path: FolderPath | None = Field(None, description="folder with train/ and val/, read as it is")
    store: FolderPath | None = Field(None, description="folder that launchers/prepare.py wrote, in place of path")
    img_size: int = Field(224, ge=8, le=2048, description="edge of the square that the network sees, in pixels")
    train_size: int | None = Field(None, ge=1, description="training images that are used, drawn; all if null")
    val_size: int | None = Field(None, ge=1, description="validation images that are used, drawn; all if null")
    size_per_class: bool = Field(default=False, description="train_size and val_size are of each class, not totals")
    max_bad_fraction: float = Field(
        0.0, ge=0, lt=1, description="share of images whose header may be unreadable; with path"
    )
    mean: Channels = Field(IMAGENET_MEAN, description="of each channel in 0 ... 1, taken away")
    std: tuple[Positive, Positive, Positive] = Field(IMAGENET_STD, description="of each channel, divided by")
    augmentation: Augmentation = Field(Augmentation(), description="what training does to an image")

    @model_validator(mode="after")
    def _one_source(self) -> ImageData:
        if (self.path is None) == (self.store is None):
            raise ValueError("give either 'path', a folder with train/ and val/, or 'store', a prepared one")
        if self.store is not None and self.max_bad_fraction:
            raise ValueError("'max_bad_fraction' needs 'path': a store was prepared with --max-bad-fraction")
        if self.size_per_class and self.train_size is None and self.val_size is None:
            raise ValueError("'size_per_class' needs 'train_size' or 'val_size'")
        return self


class ImageModel(Strict):
    """The network, what it begins with, and its loss."""

    arch: str | None = Field(None, description=f"one of {', '.join(ARCHITECTURES)}")
    path: FolderPath | None = Field(None, description="a Hugging Face folder of an image classifier, in place of arch")
    pretrained: FolderPath | None = Field(
        None,
        description="weights to begin with: .pth or .safetensors of torchvision, timm or an earlier run; with arch",
    )
    normalization: Literal["batch", "frozen", "group"] = Field(
        "batch",
        description="batch: statistics of groups of samples; frozen: the running ones, and nothing of a BatchNorm is "
        "trained; group: GroupNorm",
    )
    batch_norm_group: int = Field(
        32, ge=1, description="samples that are normalised together, which divides the micro-batch; with batch"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="share of the target that is spread over all classes")
    class_weights: Literal["balanced"] | tuple[Annotated[float, Field(ge=0)], ...] | None = Field(
        None, description="weight of each class in the loss; balanced: inversely to its training images"
    )

    @field_validator("arch")
    @classmethod
    def _known(cls, arch: str | None) -> str | None:
        if arch is not None and arch not in ARCHITECTURES:
            raise ValueError(
                f"no such network{nearest(arch, list(ARCHITECTURES))}; known are {', '.join(ARCHITECTURES)}"
            )
        return arch

    @model_validator(mode="after")
    def _one_network(self) -> ImageModel:
        if (self.arch is None) == (self.path is None):
            raise ValueError("give either 'arch', the name of a network, or 'path', a Hugging Face folder")
        if self.path is not None and self.pretrained is not None:
            raise ValueError("'pretrained' has no effect beside 'path', whose weights are used: give 'arch' with it")
        if self.path is not None and self.normalization == "group":
            raise ValueError(
                "normalization 'group' has no use for the weights of 'path', which were trained with BatchNorm: set it "
                "to 'batch' or 'frozen', or give 'arch'"
            )
        default = type(self).model_fields["batch_norm_group"].default
        if self.normalization != "batch" and self.batch_norm_group != default:
            raise ValueError(
                f"batch_norm_group {self.batch_norm_group} has no effect with normalization '{self.normalization}': "
                f"remove it, or set it to {default}"
            )
        return self


Data, Model = ImageData, ImageModel
