import io
import re
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from blip2.backbones.vision import Preprocessing
from blip2.data.images import MAX_PIXELS, ImageError, preprocess, read_image, train_transform

PLAIN = Preprocessing(32, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
CLIP = Preprocessing(24)
RED, WHITE = (255, 0, 0), (255, 255, 255)


def blocks(rows: int = 2, columns: int = 3, size: int = 8) -> np.ndarray:
    """Return blocks of random colors, which every rotation or reflection changes and JPEG preserves."""
    colors = np.random.default_rng(0).integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    return colors.repeat(size, axis=0).repeat(size, axis=1)


def file_bytes(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_of(width: int, height: int, depth: int, kind: int, chunks: list[tuple[bytes, bytes]]) -> bytes:
    """Return a PNG with `depth` bits per channel, gray (kind 0) or RGB (kind 2)."""
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    out = b"\x89PNG\r\n\x1a\n"
    for name, data in ((b"IHDR", header), *chunks, (b"IEND", b"")):
        out += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return out


def gray(image: Image.Image) -> list[int]:
    """Return the first row of an image, which must be gray."""
    pixels = np.asarray(image)
    assert image.mode == "RGB"
    assert (pixels == pixels[..., :1]).all()
    return pixels[0, :, 0].tolist()


# -- decoding -------------------------------------------------------------------------------------------------


def transposed(upright: np.ndarray) -> np.ndarray:
    return upright.swapaxes(0, 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        # The EXIF standard defines on which side of the image the stored first row and first column are.
        (1, lambda upright: upright),
        (2, lambda upright: upright[:, ::-1]),
        (3, lambda upright: upright[::-1, ::-1]),
        (4, lambda upright: upright[::-1]),
        (5, transposed),
        (6, lambda upright: transposed(upright)[::-1]),
        (7, lambda upright: transposed(upright)[::-1, ::-1]),
        (8, lambda upright: transposed(upright)[:, ::-1]),
    ],
)
def test_exif_orientation_is_applied(kind: str, orientation: int, stored: Callable[[np.ndarray], np.ndarray]) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored(blocks())))
    options: dict[str, object] = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    read = np.asarray(read_image(file_bytes(image, kind, exif=exif, **options)))
    assert read.shape == blocks().shape
    assert abs(read.astype(int) - blocks()).max() <= 4


def transparent_palette(transparency: int | bytes) -> bytes:
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 0, 255, 0, 0, 0])
    image.putdata([0, 1, 2])
    return file_bytes(image, "PNG", transparency=transparency)


def pixels(mode: str, values: list[object]) -> Image.Image:
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return image


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (
            file_bytes(pixels("RGBA", [(255, 0, 0, 0), (255, 0, 0, 255), (0, 0, 0, 51)]), "PNG"),
            [WHITE, RED, (204, 204, 204)],
        ),
        (file_bytes(pixels("LA", [(0, 0), (0, 255), (0, 51)]), "PNG"), [WHITE, (0, 0, 0), (204, 204, 204)]),
        (transparent_palette(0), [WHITE, (0, 0, 255), (0, 0, 0)]),
        (transparent_palette(bytes([255, 0, 51])), [RED, WHITE, (204, 204, 204)]),
        (file_bytes(pixels("RGB", [RED, (0, 0, 255)]), "PNG", transparency=RED), [WHITE, (0, 0, 255)]),
        (file_bytes(pixels("L", [0, 9]), "PNG", transparency=0), [WHITE, (9, 9, 9)]),
    ],
    ids=["RGBA", "LA", "palette with one clear color", "palette with alphas", "RGB with a clear color", "L"],
)
def test_transparency_becomes_white(data: bytes, expected: list[tuple[int, int, int]]) -> None:
    assert [tuple(pixel) for pixel in np.asarray(read_image(data))[0].tolist()] == expected


@pytest.mark.parametrize(
    ("depth", "kind", "row", "clear", "expected"),
    [
        (16, 0, struct.pack(">2H", 32896, 16448), struct.pack(">H", 32896), [WHITE, (64, 64, 64)]),
        (4, 0, bytes([0x36]), struct.pack(">H", 3), [WHITE, (102, 102, 102)]),
        (2, 0, bytes([0b01100000]), struct.pack(">H", 1), [WHITE, (170, 170, 170)]),
        (16, 2, struct.pack(">6H", 9000, 0, 0, 0, 0, 0), struct.pack(">3H", 9000, 0, 0), [WHITE, (0, 0, 0)]),
    ],
    ids=["16-bit gray", "4-bit gray", "2-bit gray", "16-bit color"],
)
def test_transparent_values_of_other_depths(
    depth: int, kind: int, row: bytes, clear: bytes, expected: list[tuple[int, int, int]]
) -> None:
    read = read_image(png_of(2, 1, depth, kind, [(b"tRNS", clear), (b"IDAT", zlib.compress(b"\0" + row))]))
    assert [tuple(pixel) for pixel in np.asarray(read)[0].tolist()] == expected


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize(
    ("counts", "expected"),
    # Dark images stay dark: the intended value of their brightest pixel is unknown.
    [([0, 16448, 32896, 65535], [0, 64, 128, 255]), ([0, 200, 255], [0, 1, 1])],
)
def test_16_bits_are_scaled(kind: str, counts: list[int], expected: list[int]) -> None:
    image = Image.fromarray(np.array([counts], dtype=np.uint16))
    assert gray(read_image(file_bytes(image, kind))) == expected


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_a_tiff_may_be_a_negative(dtype: type) -> None:
    white = 1 if dtype is np.float32 else np.iinfo(dtype).max
    data = bytearray(file_bytes(Image.fromarray((np.array([[0, 0.2, 1]]) * white).astype(dtype)), "TIFF"))
    assert gray(read_image(bytes(data))) == [0, 51, 255]
    entry = data.index(struct.pack("<HHIH", 262, 3, 1, 1))  # photometric interpretation: 0 is black
    data[entry : entry + 10] = struct.pack("<HHIH", 262, 3, 1, 0)
    assert gray(read_image(bytes(data))) == [255, 204, 0]


@pytest.mark.parametrize("white", [1, 255, 65535, 2_000_000])
def test_float_tiff(white: int) -> None:
    image = Image.fromarray(np.array([[0, 0.25, 0.5, 1]], dtype=np.float32) * white)
    assert gray(read_image(file_bytes(image, "TIFF"))) == [0, 64, 128, 255]


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_an_image_with_values_below_zero(dtype: type) -> None:
    """It would be read as a nearly black image."""
    image = Image.fromarray((np.linspace(-1, 1, 12).reshape(3, 4) * (1 if dtype == np.float32 else 300)).astype(dtype))
    for given in (image, file_bytes(image, "TIFF")):
        with pytest.raises(ImageError, match=r"holds values from -.*, expected none below 0: scale or shift them$"):
            read_image(given)
    overshoot = Image.fromarray(np.array([[-0.02, 0.5, 1]], dtype=np.float32))  # of resampling
    assert gray(read_image(overshoot)) == [0, 128, 255]


def test_an_image_without_pixels() -> None:
    with pytest.raises(ImageError, match=r"has 0 x 5 pixels, expected at least one: replace it$"):
        read_image(Image.new("RGB", (0, 5)))


def test_one_bit() -> None:
    assert gray(read_image(file_bytes(pixels("1", [0, 255, 0]), "PNG"))) == [0, 255, 0]


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), color).quantize(4) for color in ("red", "blue")]
    data = file_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
    with Image.open(io.BytesIO(data)) as animation:
        assert animation.n_frames == 2
    assert read_image(data).getpixel((4, 4)) == RED


@pytest.mark.parametrize(
    ("ink", "color"), [((0, 255, 255, 0), RED), ((255, 0, 0, 0), (0, 255, 255)), ((0, 0, 0, 0), WHITE)]
)
def test_colors_of_a_cmyk_jpeg(ink: tuple[int, ...], color: tuple[int, ...]) -> None:
    read = read_image(file_bytes(Image.new("CMYK", (16, 16), ink), "JPEG", quality=100))
    assert read.getpixel((8, 8)) == pytest.approx(color, abs=4)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([[0, 7, 255]], dtype=np.uint8), [0, 7, 255]),
        (np.array([[[0], [7], [255]]], dtype=np.uint8), [0, 7, 255]),
        (np.array([[0, 128, 255]]), [0, 128, 255]),
        (np.array([[False, True]]), [0, 255]),
        (np.array([[0, 257, 65535]], dtype=np.uint16), [0, 1, 255]),
        (np.array([[0, 255]], dtype=np.uint16), [0, 1]),
        (np.array([[0, 257, 32896]], dtype=np.int32), [0, 1, 128]),
        (np.array([[0, 0.2, 1]], dtype=np.float16), [0, 51, 255]),
        # Resampling overshoots: such an image is not in [0, 255].
        (np.array([[-0.01, 0.2, 1.02]]), [0, 51, 255]),
    ],
)
def test_gray_arrays(array: np.ndarray, expected: list[int]) -> None:
    assert gray(read_image(array)) == expected
    assert gray(read_image(torch.from_numpy(array))) == expected


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_color_arrays(dtype: type) -> None:
    white = {np.uint8: 255, np.uint16: 65535, np.float32: 1}[dtype]
    colors = np.array([[[1, 0, 0], [0, 1, 0]]], dtype=dtype) * dtype(white)
    assert np.asarray(read_image(colors)).tolist() == [[[255, 0, 0], [0, 255, 0]]]
    clear = np.concatenate([colors, np.array([[[white], [0]]], dtype=dtype)], axis=2)
    assert np.asarray(read_image(clear)).tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_bfloat16_tensor() -> None:
    assert gray(read_image(torch.tensor([[0.0, 0.25, 1.0]], dtype=torch.bfloat16))) == [0, 64, 255]


def test_all_types_of_images(tmp_path: Path) -> None:
    image = Image.fromarray(blocks())
    path = tmp_path / "blocks.png"
    image.save(path)
    with Image.open(path) as opened:
        data = path.read_bytes()
        files = (io.BytesIO(data), bytearray(data), memoryview(data))
        for given in (path, str(path), data, *files, *files, image, opened, blocks(), torch.from_numpy(blocks())):
            assert np.array_equal(np.asarray(read_image(given)), blocks())


# -- errors -------------------------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    """Return a black 1-bit PNG without holding its pixels in memory."""
    packer, row = zlib.compressobj(1), bytes(1 + (width + 7) // 8)
    packed = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    return png_of(width, height, 1, 0, [(b"IDAT", packed)])


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
NOT_A_NUMBER = Image.fromarray(np.array([[0, np.nan]], dtype=np.float32))


@pytest.mark.parametrize(
    ("name", "data", "found", "advice"),
    [
        ("missing.jpg", None, "No such file", "check its path and permissions"),
        ("empty.jpg", b"", "0 bytes", "copy or download it again"),
        (
            "text.jpg",
            b"Not Found",
            "not an image (it does not begin like an image)",
            "replace it by a PNG or JPEG file",
        ),
        ("cut.jpg", file_bytes(NOISE, "JPEG")[:1500], "damaged", "copy or download it again"),
        ("cut.png", file_bytes(NOISE, "PNG")[:1500], "damaged", "copy or download it again"),
        ("nan.tif", file_bytes(NOT_A_NUMBER, "TIFF"), "not finite", "replace them"),
        ("huge.png", png(12_001, 10_000), "12001 x 10000 pixels", "make it smaller"),
        # Decoding PostScript would run a program from an untrusted file.
        ("program.jpg", file_bytes(Image.new("RGB", (4, 4)), "EPS"), "PostScript", "save it as PNG or JPEG"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, data: bytes | None, found: str, advice: str) -> None:
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ImageError) as error:
        read_image(path)
    message = str(error.value)
    assert str(path) in message
    assert found in message
    assert message.endswith(advice)
    assert "\n" not in message


def test_a_decompression_bomb_is_not_decoded(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    bomb = tmp_path / "bomb.png"
    bomb.write_bytes(png(30_000, 30_000))
    assert bomb.stat().st_size < 1_000_000
    before = peak()
    with pytest.raises(ImageError, match=rf"bomb\.png has more than the {MAX_PIXELS:,} pixels allowed"):
        read_image(bomb)
    assert peak() - before < 100e6


def test_folder_is_not_an_image(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="check the path"):
        read_image(tmp_path)


def test_impossible_path() -> None:
    with pytest.raises(ImageError, match="check its path"):
        read_image("a\0b.jpg")


def test_damaged_image_opened_by_pil() -> None:
    with Image.open(io.BytesIO(file_bytes(NOISE, "PNG")[:1500])) as opened, pytest.raises(ImageError, match="damaged"):
        read_image(opened)


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.zeros(3), r"shape \[3\]"),
        (np.zeros((5, 5, 2)), r"shape \[5, 5, 2\]"),
        (np.zeros((3, 8, 8)), r"shape \[3, 8, 8\]"),
        (np.zeros((1, 8, 8, 3)), r"shape \[1, 8, 8, 3\]"),
        (np.zeros((0, 8, 3)), r"shape \[0, 8, 3\]"),
        (np.full((2, 2), np.nan), "not finite"),
        (np.full((2, 2), np.inf), "not finite"),
        (np.full((2, 2), "a"), "expected integers or floats"),
        (np.full((2, 2), 1j), "expected integers or floats"),
        (np.linspace(-1, 1, 12).reshape(2, 2, 3), r"float64 from -1 to 1, expected floats in \[0, 1\] or integers"),
        (np.linspace(0.1, 2.1, 4, dtype=np.float32).reshape(2, 2), "float32 from 0.1 to 2.1"),
        (np.array([[0, 51.0, 255]]), "float64 from 0 to 255"),
        (np.array([[-3, 200]]), "int64 from -3 to 200"),
    ],
)
def test_broken_arrays(array: np.ndarray, found: str) -> None:
    with pytest.raises(ImageError, match=rf"^the array given as an image .*{found}.*: .*\w+ (it|them)$"):
        read_image(array)
    if array.dtype.kind in "if" and array.ndim < 4:
        with pytest.raises(ImageError, match=found.replace("float64", "float32")):
            read_image(torch.from_numpy(array))


@pytest.mark.parametrize("tensor", [torch.eye(4).to_sparse(), torch.zeros(4, 4, 3, device="meta")])
def test_tensors_without_an_array(tensor: torch.Tensor) -> None:
    with pytest.raises(ImageError, match=r"has no array of values .*: give a dense tensor on a device$"):
        read_image(tensor)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        (None, "None"), (7, "7"), (["a.png", "b.png"], "a list of 2"), ({"bytes": b"", "path": None}, "a dict of 2"),
        ((n for n in range(3)), "<generator object"), (io.StringIO("a"), "<_io.StringIO object"),
        ("https://x.org/a.png", "the URL 'https://x.org/a.png', expected the path of a file: download the image first"),
        ("file:///a.png", "the URL 'file:///a.png', expected the path of a file: leave out file://"),
    ],
)  # fmt: skip
def test_other_objects_are_refused(given: object, found: str) -> None:
    with pytest.raises(ImageError, match=f"^an image is {re.escape(found)}") as error:
        read_image(given)
    assert "\n" not in str(error.value) and "expected" in str(error.value)


# -- pixels ----------------------------------------------------------------------------------------------------------


def test_preprocess_equals_resizing_by_pil() -> None:
    image = Image.fromarray(blocks())
    resized = np.asarray(image.resize((24, 24), Image.Resampling.BICUBIC)) / 255
    expected = (resized - np.array(CLIP.mean)) / np.array(CLIP.std)
    result = preprocess(image, CLIP)
    assert (result.shape, result.dtype) == ((3, 24, 24), torch.float32)
    np.testing.assert_allclose(result.permute(1, 2, 0).numpy(), expected, atol=1e-5)


def test_preprocess_keeps_the_whole_image() -> None:
    """Three stripes of equal width in a wide image have equal width in the square."""
    wide = np.zeros((20, 240, 3), dtype=np.uint8)
    for stripe in range(3):
        wide[:, 80 * stripe : 80 * stripe + 80, stripe] = 255
    result = preprocess(Image.fromarray(wide), Preprocessing(36, PLAIN.mean, PLAIN.std))
    expected = torch.eye(3)[:, None].repeat_interleave(12, dim=2).expand(3, 36, 36)
    away_from_edges = torch.tensor([column for column in range(36) if column % 12 not in (0, 11)])
    torch.testing.assert_close(result[..., away_from_edges], expected[..., away_from_edges], atol=0.02, rtol=0)


SLOPES = Image.fromarray(
    np.stack([np.arange(240)[None].repeat(240, 0), np.arange(240)[:, None].repeat(240, 1), np.zeros((240, 240))], 2)
    .round()
    .astype(np.uint8)
)
"""Red is the horizontal, green the vertical position of a pixel."""


def crop_of(result: Tensor) -> tuple[float, float, float, float]:
    """Return (left, top, width, height) of a crop of SLOPES; the width is negative if it is mirrored."""
    size = result.shape[1]
    low, high = size // 4, 3 * size // 4
    out = []
    for line in (result[0, size // 2], result[1, :, size // 2]):
        slope = float(line[high] - line[low]) * 255 / (high - low)  # of a pixel
        out.append((float(line[low]) * 255 - slope * (low + 0.5), slope * size))
    (left, width), (top, height) = out
    return left, top, width, height


def crops(smallest: float, flip: bool, count: int = 300) -> np.ndarray:
    random = np.random.default_rng(1)
    return np.array([crop_of(train_transform(SLOPES, PLAIN, random, smallest, flip)) for _ in range(count)])


@pytest.mark.parametrize("smallest", [0.3, 0.5])
def test_crops(smallest: float) -> None:
    left, top, width, height = crops(smallest, flip=False).T
    areas = width * height / 240**2
    assert smallest - 0.03 < areas.min() < smallest + 0.05
    assert 0.9 < areas.max() < 1.03
    assert ((width / height > 0.73) & (width / height < 1.37)).all()
    assert min(left.min(), top.min()) > -2
    assert max((left + width).max(), (top + height).max()) < 242
    # Crops are spread over the whole image.
    room = 240 - width
    places = left[room > 30] / room[room > 30]
    assert places.min() < 0.1
    assert places.max() > 0.9


@pytest.mark.parametrize(("flip", "least", "most"), [(False, 0, 0), (True, 0.4, 0.6)])
def test_mirroring(flip: bool, least: float, most: float) -> None:
    assert least <= (crops(0.5, flip)[:, 2] < 0).mean() <= most


def test_the_whole_image_if_no_crop_fits() -> None:
    narrow = SLOPES.crop((0, 0, 10, 240))
    result = train_transform(narrow, PLAIN, np.random.default_rng(0), 0.5, flip=False)
    torch.testing.assert_close(result, preprocess(narrow, PLAIN))


def test_train_transform_depends_on_its_generator_only() -> None:
    image = Image.fromarray(blocks())
    first, again, other = (train_transform(image, CLIP, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert first.shape == (3, 24, 24)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
