"""From a picture file to a model's input array.

Steps, in this order: decode, convert to the wanted channels, fit to the wanted height and width, multiply by
`scale`, subtract `mean`, divide by `std`, arrange as the model's layout.

| preset | fit | value of a channel | channels |
|---|---|---|---|
| imagenet | short side to 256/224 of the crop, centre crop | (x/255 - MEAN) / STD | RGB |
| imagenet-inception | the same | x/127.5 - 1 | RGB |
| unit | the same | x/255 | RGB |
| raw | the same | x, 0..255 | RGB |
| raw-bgr | the same | x, 0..255 | BGR |
| cifar10 | stretch | as imagenet | RGB |
| mnist | stretch | x, 0..255 | grey |

MEAN is 0.485, 0.456, 0.406 and STD 0.229, 0.224, 0.225 (ImageNet's, for R, G, B).

Height and width come from the model's input; a preset is for any size. A TOML file says the same in its own words,
every key optional (defaults are those of `raw`):

    fit = "crop"                   # or "stretch", or "pad": keep the ratio, fill right and bottom
    resize = 256                   # short side before a centre crop; default 256/224 of the crop
    size = [224, 224]              # height, width: only where the model's are dynamic
    fill = 114                     # value of padding, 0..255
    channels = "rgb"               # or "bgr", "gray"
    scale = 0.00392156862745098
    mean = [0.485, 0.456, 0.406]   # after `scale`; one number or one a channel
    std = [0.229, 0.224, 0.225]
    layout = "nchw"                # or "nhwc"; default: where the model's input has 1 or 3
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np

from graphopt.errors import DataError, nearest
from graphopt.model import TensorSpec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

Fit = Literal["crop", "stretch", "pad"]
Channels = Literal["rgb", "bgr", "gray"]


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes an input; see the module's text for the steps."""

    fit: Fit = "crop"
    resize: int | None = None
    size: tuple[int, int] | None = None
    fill: int = 0
    channels: Channels = "rgb"
    scale: float = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    layout: Literal["auto", "nchw", "nhwc"] = "auto"


_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PRESETS: dict[str, Preprocess] = {
    "imagenet": Preprocess(scale=1 / 255, mean=_MEAN, std=_STD),
    "imagenet-inception": Preprocess(scale=1 / 127.5, mean=(1.0,)),
    "unit": Preprocess(scale=1 / 255),
    "raw": Preprocess(),
    "raw-bgr": Preprocess(channels="bgr"),
    "cifar10": Preprocess(fit="stretch", scale=1 / 255, mean=_MEAN, std=_STD),
    "mnist": Preprocess(fit="stretch", channels="gray"),
}


def load_preprocess(name: str | Path) -> Preprocess:
    """A preset by its name, or the contents of a `.toml` file. Raises DataError."""
    text = str(name)
    if text in PRESETS:
        return PRESETS[text]
    if not text.endswith(".toml"):
        near = nearest(text, PRESETS)
        hint = f"did you mean {near!r}?" if near else f"presets: {', '.join(PRESETS)}; or give a .toml file"
        raise DataError(f"unknown preprocessing {text!r}", hint=hint)
    try:
        table = tomllib.loads(Path(text).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {text}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{text} is not valid TOML: {error}") from error
    return _from_table(table, text)


def _from_table(table: dict[str, Any], where: str) -> Preprocess:
    known = [f.name for f in fields(Preprocess)]
    for key in table:
        if key not in known:
            near = nearest(key, known)
            hint = f"did you mean {near!r}?" if near else f"known: {', '.join(known)}"
            raise DataError(f"{where} has unknown key {key!r}", hint=hint)
    values: dict[str, Any] = {}
    for key, allowed in (("fit", ("crop", "stretch", "pad")), ("channels", ("rgb", "bgr", "gray")),
                         ("layout", ("auto", "nchw", "nhwc"))):  # fmt: skip
        if key in table:
            if table[key] not in allowed:
                raise DataError(f"{where}: {key} must be one of {', '.join(allowed)}, not {table[key]!r}")
            values[key] = table[key]
    if "resize" in table:
        values["resize"] = _whole(table["resize"], "resize", where, 1, 65535)
    if "fill" in table:
        values["fill"] = _whole(table["fill"], "fill", where, 0, 255)
    if "size" in table:
        size = table["size"] if isinstance(table["size"], list) else [table["size"]] * 2
        if len(size) != 2:
            raise DataError(f"{where}: size must be [height, width]")
        values["size"] = tuple(_whole(v, "size", where, 1, 65535) for v in size)
    if "scale" in table:
        (values["scale"],) = _numbers(table["scale"], "scale", where, (1,))
    for key in ("mean", "std"):
        if key in table:
            values[key] = _numbers(table[key], key, where, (1, 3))
    if 0.0 in values.get("std", ()):
        raise DataError(f"{where}: std must not be 0")
    return Preprocess(**values)


def _whole(value: Any, key: str, where: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise DataError(f"{where}: {key} must be an integer from {low} to {high}, not {value!r}")
    return value


def _numbers(value: Any, key: str, where: str, lengths: tuple[int, ...]) -> tuple[float, ...]:
    items = value if isinstance(value, list) else [value]
    good = all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in items)
    if not good or len(items) not in lengths:
        raise DataError(f"{where}: {key} must be {' or '.join(map(str, lengths))} finite number(s), not {value!r}")
    return tuple(float(v) for v in items)


@dataclass(frozen=True)
class PictureFormat:
    """A preprocessing bound to one input: every choice made."""

    steps: Preprocess
    height: int
    width: int
    nhwc: bool
    dtype: np.dtype

    @staticmethod
    def fitting(steps: Preprocess, spec: TensorSpec) -> PictureFormat:
        """Bind to the input `spec`, (N,C,H,W) or (N,H,W,C). Raises DataError where they do not fit."""
        if len(spec.shape) != 4:
            raise DataError(f"input {spec} does not take pictures: rank 4 is needed", hint="give the data as .npz")
        if spec.dtype.kind not in "fu":
            raise DataError(f"input {spec} does not take pictures: float or uint8 is needed")
        wanted = 1 if steps.channels == "gray" else 3
        nhwc = steps.layout == "nhwc"
        if steps.layout == "auto":
            if spec.shape[1] != wanted and spec.shape[3] != wanted:
                raise DataError(
                    f"input {spec} has no axis of {wanted} channels", hint="choose other channels, or say the layout"
                )
            nhwc = spec.shape[1] != wanted
        channels, height, width = (spec.shape[i] for i in ((3, 1, 2) if nhwc else (1, 2, 3)))
        if isinstance(channels, int) and channels != wanted:
            raise DataError(f"input {spec} has {channels} channels, the preprocessing makes {wanted}")
        given = steps.size or (None, None)
        sides = [want if isinstance(want, int) else have for want, have in zip((height, width), given, strict=True)]
        if steps.size is not None and tuple(sides) != steps.size:
            raise DataError(f"input {spec} takes {sides[0]}x{sides[1]}, the preprocessing says {given[0]}x{given[1]}")
        if sides[0] is None or sides[1] is None:
            raise DataError(f"input {spec} has a dynamic height or width", hint="fix them, or give size in a .toml")
        return PictureFormat(steps, sides[0], sides[1], nhwc, spec.dtype)

    def decode(self, file: Path) -> np.ndarray:
        """The picture, fitted: uint8 (height, width, channels). Raises DataError naming the file."""
        from PIL import Image

        try:
            with Image.open(file) as opened:
                picture = opened.convert("L" if self.steps.channels == "gray" else "RGB")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"cannot read picture {file}: {error}") from error
        array = np.asarray(self._fit(picture), dtype=np.uint8).reshape(self.height, self.width, -1)
        return array[..., ::-1] if self.steps.channels == "bgr" else array

    def _fit(self, picture):
        from PIL import Image

        height, width = self.height, self.width
        if self.steps.fit == "stretch":
            if picture.size == (width, height):
                return picture
            return picture.resize((width, height), Image.Resampling.BILINEAR)
        if self.steps.fit == "pad":
            ratio = min(height / picture.height, width / picture.width)
            inner = (max(1, round(picture.width * ratio)), max(1, round(picture.height * ratio)))
            fill = self.steps.fill if picture.mode == "L" else (self.steps.fill,) * 3
            canvas = Image.new(picture.mode, (width, height), fill)
            canvas.paste(picture.resize(inner, Image.Resampling.BILINEAR), (0, 0))
            return canvas
        short = self.steps.resize or round(min(height, width) * 256 / 224)
        ratio = max(short / min(picture.size), height / picture.height, width / picture.width)
        if ratio != 1.0:
            size = (max(width, round(picture.width * ratio)), max(height, round(picture.height * ratio)))
            picture = picture.resize(size, Image.Resampling.BILINEAR)
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
        return picture.crop((left, top, left + width, top + height))

    def finish(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 (n, height, width, channels) to the model's input, one row a picture."""
        arranged = np.ascontiguousarray(pictures if self.nhwc else pictures.transpose(0, 3, 1, 2))
        if self.dtype.kind == "u":
            return arranged.astype(self.dtype, copy=False)
        # Arranged first, as bytes: arithmetic on whole planes is faster than on three channels of a pixel.
        by_channel = (-1,) if self.nhwc else (-1, 1, 1)
        values = arranged.astype(np.float32)
        values *= np.float32(self.steps.scale)
        values -= np.asarray(self.steps.mean, np.float32).reshape(by_channel)
        values /= np.asarray(self.steps.std, np.float32).reshape(by_channel)
        return values.astype(self.dtype, copy=False)
