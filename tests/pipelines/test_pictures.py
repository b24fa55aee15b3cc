"""One picture: every mode to colour or grey, and every reason to leave one out."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.data_config import DataConfig
from pipelines.pictures import BadPicture, check_header, read_picture
from tests.pipelines.pictured import encoded, pixels

COLOUR = DataConfig(kind="folder", path="a")


def resized_to(size: int, **changes: Any) -> DataConfig:
    return DataConfig(**{"kind": "folder", "path": "a", "image_size": size, **changes})


def reason(contents: bytes, config: DataConfig, *, of_header: bool = False) -> str:
    with pytest.raises(BadPicture) as bad:
        (check_header if of_header else read_picture)(io.BytesIO(contents), config)
    return str(bad.value)


def test_colour_is_exact() -> None:
    image = pixels(1)[0]
    assert np.array_equal(read_picture(io.BytesIO(encoded(image)), COLOUR), image)


@pytest.mark.parametrize("kind", ["avif", "bmp", "gif", "jpeg", "mpo", "png", "ppm", "tiff", "webp"])
def test_formats(kind: str) -> None:
    grey = Image.new("RGB", (16, 16), (120, 120, 120))
    read = read_picture(io.BytesIO(encoded(grey, kind)), COLOUR)
    assert read.shape == (16, 16, 3) and abs(read.astype(int) - 120).max() <= 2


def test_formats_that_start_programs_are_not_opened() -> None:
    assert reason(encoded(Image.new("RGB", (8, 8)), "eps"), COLOUR) == "no picture of a known format"


@pytest.mark.parametrize("mode", ["P", "RGBA", "CMYK", "1", "L", "LA", "YCbCr"])
def test_modes(mode: str) -> None:
    contents = encoded(Image.new("RGB", (5, 7), (255, 255, 255)).convert(mode), "tiff" if mode != "P" else "png")
    assert (read_picture(io.BytesIO(contents), COLOUR) >= 254).all()
    assert read_picture(io.BytesIO(contents), resized_to(0, channels=1)).shape == (7, 5, 1)


def test_twenty_megapixels() -> None:
    """A plain wide picture: the middle square of it, of the same colour."""
    wide = encoded(Image.new("RGB", (5472, 3648), (200, 100, 48)), "jpeg")
    assert len(wide) < 400_000
    read = read_picture(io.BytesIO(wide), resized_to(16))
    assert read.shape == (16, 16, 3) and abs(read.astype(int) - [200, 100, 48]).max() <= 2


def test_what_is_no_picture() -> None:
    assert reason(b"hello", COLOUR) == reason(b"", COLOUR, of_header=True) == "no picture of a known format"


def test_truncation_shows_only_in_the_pixels() -> None:
    half = encoded(pixels(1, 64)[0])[:6000]
    check_header(io.BytesIO(half), COLOUR)
    assert "truncated" in reason(half, COLOUR)


@pytest.mark.parametrize("of_header", [False, True])
def test_headers_tell_what_does_not_fit(of_header: bool) -> None:
    deep = encoded(Image.new("I;16", (6, 6)))
    assert reason(deep, COLOUR, of_header=of_header) == "more than 8 bits a channel (mode I;16)"
    small = encoded(Image.new("RGB", (30, 7)))
    assert reason(small, resized_to(15), of_header=of_header) == "30x7: would be enlarged more than twice"
    for fitting in (resized_to(14), resized_to(30, fit="pad"), COLOUR):
        (check_header if of_header else read_picture)(io.BytesIO(small), fitting)
    with pytest.raises(ValueError, match="of 30x7 do not fit into image_size 29") as error:
        (check_header if of_header else read_picture)(io.BytesIO(small), resized_to(29, fit="pad"))
    assert not isinstance(error.value, BadPicture)


@pytest.mark.parametrize("of_header", [False, True])
def test_decompression_bomb(of_header: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    bomb = encoded(pixels(1, 11)[0])
    assert reason(bomb, COLOUR, of_header=of_header) == "more than 100 pixels, as a decompression bomb has"


def test_any_error_of_a_reader_is_a_reason_and_one_of_the_disk_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_image: Any) -> None:
        raise ZeroDivisionError("division\nby zero " + 200 * "x")

    monkeypatch.setattr("pipelines.pictures.ImageOps.exif_transpose", broken)
    assert reason(encoded(pixels(1)[0]), COLOUR).startswith("division by zero xxx")
    assert len(reason(encoded(pixels(1)[0]), COLOUR)) == 100

    class BrokenDisk(io.BytesIO):
        def read(self, *_: Any) -> bytes:
            raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        read_picture(BrokenDisk(b""), COLOUR)
