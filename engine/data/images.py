"""The images of a prompt: found, decoded once and named by their bytes before any work starts."""

import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

from tandem.engine.types import Prompt, PromptImage

MAX_IMAGE_BYTES = 20 << 20
# Vision towers scale down what is larger; a decoder takes 3 bytes a pixel.
MAX_IMAGE_PIXELS = 64_000_000


def read_images(record: dict[str, Any], where: str, folder: Path) -> tuple[PromptImage, ...]:
    """The files that the field `image` (a path) or `images` (a list of paths) names, relative ones in `folder`.

    Raises: ValueError naming line, file and rule for a file that is missing, too large, or no image that Pillow decodes.
    """
    if "image" in record and "images" in record:
        raise ValueError(f"{where}: found both 'image' and 'images'; give one of them")
    named = [record["image"]] if "image" in record else record.get("images", [])
    if not isinstance(named, list) or not all(isinstance(name, str) and name for name in named):
        raise ValueError(f"{where}: images are {named!r:.80}; they must be paths of files")
    return tuple(_read_image((folder / name).absolute(), where) for name in named)


def refuse_images(prompts: Iterable[Prompt], remedy: str) -> None:
    """Raises: ValueError naming the first prompt with an image, for who would read its text only."""
    for prompt in prompts:
        if prompt.images:
            raise ValueError(f"prompt {prompt.id!r} has {len(prompt.images)} image(s), such as {prompt.images[0].path}; {remedy}")


def _read_image(file: Path, where: str) -> PromptImage:
    if not file.is_file():
        raise ValueError(f"{where}: image {file} does not exist or is no file; relative paths count from the folder of the prompts file")
    size = file.stat().st_size
    if size > MAX_IMAGE_BYTES:
        raise ValueError(f"{where}: image {file} has {size} bytes; at most {MAX_IMAGE_BYTES} are allowed, scale it down")
    try:
        with warnings.catch_warnings(), Image.open(file) as image:
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the rule below is stricter than the warning
            width, height = image.size
            if width * height > MAX_IMAGE_PIXELS:
                raise ValueError(
                    f"{where}: image {file} has {width} x {height} pixels; at most {MAX_IMAGE_PIXELS} are allowed, scale it down"
                )
            image.load()
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{where}: image {file} cannot be decoded: {error}") from error
    return PromptImage(str(file), PromptImage.digest_of(file.read_bytes()))
