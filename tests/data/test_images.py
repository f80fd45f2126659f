"""One reader of images: what a viewer shows, whatever the file; and one sentence for what is no image."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from xomni_jax.data.images import MAX_PIXELS, TooManyPixels, UnreadableImage, read_image, to_rgb
from xomni_jax.data.preprocess import preprocess, trained_limits

GREY = np.array([[0, 60, 120], [180, 240, 255]], np.float64)  # levels of the images below
ALL = {"PNG": {}, "JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}, "TIFF": {}}


def encoded(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def array(data, **options):
    return np.asarray(read_image(data, **options)).astype(int)


# ---- orientation ----
@pytest.fixture(scope="module")
def scene():
    """Four flat quarters of 16 x 24 pixels, which also JPEG keeps."""
    colours = np.array([[[200, 30, 30], [30, 160, 60]], [[30, 60, 200], [230, 210, 40]]], np.uint8)
    return Image.fromarray(colours.repeat(16, 0).repeat(24, 1))


def stored(image, orientation):
    """How a camera stores the upright image under an orientation of EXIF: the inverse of what a viewer applies."""
    pixels = np.asarray(image)
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    rows, columns = {1: (1, 1), 2: (1, -1), 3: (-1, -1), 4: (-1, 1), 5: (1, 1), 6: (-1, 1), 7: (-1, -1), 8: (1, -1)}[orientation]
    return Image.fromarray(np.ascontiguousarray(pixels[::rows, ::columns]))


@pytest.mark.parametrize("kind", [*ALL, "TIFF deflate"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says(scene, kind, orientation):
    name, _, compression = kind.partition(" ")
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = ALL[name] | ({"compression": "tiff_adobe_deflate"} if compression else {})
    data = encoded(stored(scene, orientation), name, exif=exif, **options)
    np.testing.assert_allclose(array(data), np.asarray(scene, int), atol=3)
    with Image.open(io.BytesIO(data)) as image:  # an image that a user opened
        pixels = preprocess(image, trained_limits(((32, 64), (32, 128)), 8))
        np.testing.assert_allclose((pixels + 1) * 127.5, np.asarray(scene, float), atol=3.5)
        if name != "TIFF":  # of which Pillow itself turns the pixels
            assert read_image(data, as_stored=True).size == image.size


def test_damaged_exif_does_not_hide_the_image(scene):
    for exif in (b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b""):
        assert read_image(encoded(scene, "JPEG", exif=exif)).size == scene.size


# ---- samples ----
def png(levels, bits, colour=0, chunks=()):
    """A PNG file from samples [Y, X] or [Y, X, C]."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = b"".join(b"\0" + row.astype(">u2" if bits == 16 else "u1").tobytes() for row in levels)
    header = struct.pack(">IIBBBBB", levels.shape[1], levels.shape[0], bits, colour, 0, 0, 0)
    extra = b"".join(chunk(*c) for c in chunks)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff(samples, sign, order, photometric=1):
    """An uncompressed TIFF file from samples [Y, X] or [Y, X, C]; `sign`: 1 unsigned, 2 signed, 3 float."""
    count = 1 if samples.ndim == 2 else samples.shape[2]
    data = samples.astype(samples.dtype.newbyteorder(order)).tobytes()
    bits, signs = [samples.itemsize * 8] * count, [sign] * count
    tags = [(256, [samples.shape[1]]), (257, [samples.shape[0]]), (258, bits), (259, [1]), (262, [photometric]), (273, None)]
    tags += [(277, [count]), (278, [samples.shape[0]]), (279, [len(data)]), (339, signs)]
    start, extra, entries = 8 + 2 + 12 * len(tags) + 4, b"", b""
    for tag, values in tags:
        kind = "I" if tag in (273, 279) else "H"
        values = values or [start + (4 * count if count > 2 else 0)]  # the samples, after what is too long for its entry
        raw = struct.pack(f"{order}{len(values)}{kind}", *values)
        if len(raw) > 4:
            raw, extra = struct.pack(order + "I", start + len(extra)), extra + raw
        entries += struct.pack(order + "HHI", tag, 4 if kind == "I" else 3, len(values)) + raw.ljust(4, b"\0")
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(order + "IH", 8, len(tags)) + entries + bytes(4) + extra + data


SAMPLES = {  # name: dtype, sign, what white is
    "16 bit": ("u2", 1, 2**16 - 1),
    "signed 16 bit": ("i2", 2, 2**15 - 1),
    "32 bit": ("u4", 1, 2**32 - 1),
    "signed 32 bit": ("i4", 2, 2**31 - 1),
    "32 bit holding 16": ("i4", 2, 2**16 - 1),
    "32 bit holding 8": ("u4", 1, 255),
    "float to 1": ("f4", 3, 1),
    "float to 255": ("f4", 3, 255),
    "float to 65535": ("f4", 3, 2**16 - 1),
}


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("name", SAMPLES)
def test_wide_samples_of_tiff_are_scaled(name, order):
    dtype, sign, white = SAMPLES[name]
    data = tiff((GREY / 255 * white).astype(dtype), sign, order)
    if (dtype, order) == ("u4", ">"):  # Pillow knows no such file
        with pytest.raises(UnreadableImage, match="or of a rare kind"):
            read_image(data)
        return
    np.testing.assert_allclose(array(data)[..., 0], GREY, atol=1)
    with Image.open(io.BytesIO(data)) as image:
        image = image.resize((60, 40), Image.Resampling.NEAREST) if image.mode in "IF" else image
        assert to_rgb(image).mode == "RGB"


@pytest.mark.parametrize("count", [3, 4])
def test_wide_colour_samples(count):
    colour = np.repeat(GREY[..., None], count, -1)
    colour[..., 3:] = 255
    for data in (tiff((colour * 257).astype("u2"), 1, "<", 2), png(colour * 257, 16, {3: 2, 4: 6}[count])):
        np.testing.assert_allclose(array(data), colour[..., :3], atol=1)


def test_white_is_zero():
    for samples, sign in (((65535 - GREY * 257).astype("u2"), 1), ((1 - GREY / 255).astype("f4"), 3)):
        np.testing.assert_allclose(array(tiff(samples, sign, "<", 0))[..., 0], GREY, atol=1)


@pytest.mark.parametrize(
    "image",
    [Image.fromarray((GREY * 257).astype("u2")), Image.fromarray((GREY * 257).astype("i4")), Image.fromarray((GREY / 255).astype("f4"))],
)
def test_images_in_memory_are_scaled_too(image):
    np.testing.assert_allclose(np.asarray(to_rgb(image))[..., 0], GREY, atol=1)


def test_negative_samples_begin_at_black():
    levels = array(tiff((GREY / 127.5 - 1).astype("f4"), 3, "<"))[..., 0]
    np.testing.assert_allclose(levels, GREY, atol=1)


def test_a_flat_image_of_wide_samples():
    for value, level in ((0, 0), (1, 255)):
        assert (array(tiff(np.full((2, 2), value, "f4"), 3, "<")) == level).all()


def test_samples_that_are_no_numbers():
    for value in (np.nan, np.inf):
        with pytest.raises(UnreadableImage, match="not finite numbers"):
            read_image(tiff(np.full((2, 2), value, "f4"), 3, "<"))


# ---- transparency and other modes ----
def letters(mode):
    """Black letters on nothing, or its nearest in a mode with transparency."""
    alpha = np.zeros((8, 12), np.uint8)
    alpha[2:6, 3:9], alpha[4, 4] = 255, 51
    image = Image.fromarray(np.stack([np.zeros_like(alpha)] * 3 + [alpha], -1))
    if mode == "P":
        flat = Image.fromarray((alpha == 255).astype(np.uint8), "P")
        flat.putpalette([0, 0, 0, 0, 0, 0])
        return flat
    return image.convert(mode)


@pytest.mark.parametrize(
    "mode, kind, options",
    [
        ("RGBA", "PNG", {}),
        ("LA", "PNG", {}),
        ("P", "PNG", {"transparency": 0}),
        ("P", "GIF", {"transparency": 0}),
        ("RGBA", "WEBP", {"lossless": True}),
        ("RGBA", "TIFF", {}),
    ],
)
def test_transparent_parts_are_white(mode, kind, options):
    data = encoded(letters(mode), kind, **options)
    seen, plain = array(data), array(data, as_stored=True)
    assert (seen[0] == 255).all() and (seen[2, 3:9] == 0).all() and (plain == 0).all()
    if mode != "P":
        assert (seen[4, 4] == 204).all()  # 20% of black


@pytest.mark.parametrize("bits, colour, see", [(8, 0, ">H"), (16, 0, ">H"), (8, 2, ">HHH"), (16, 2, ">HHH")])
def test_a_transparent_value_is_white(bits, colour, see):
    samples = GREY * (257 if bits == 16 else 1)
    if colour:
        samples = np.repeat(samples[..., None], 3, -1)
    mark = struct.pack(see, *[int(samples.flat[0])] * (3 if colour else 1))
    want = np.where(GREY == 0, 255, GREY)
    np.testing.assert_allclose(array(png(samples, bits, colour, [(b"tRNS", mark)]))[..., 0], want, atol=1)


def test_cmyk_and_other_modes():
    red = Image.new("RGB", (16, 16), (200, 30, 30))
    for mode, kind in (("CMYK", "JPEG"), ("CMYK", "TIFF"), ("YCbCr", "JPEG"), ("P", "PNG"), ("P", "GIF"), ("RGB", "BMP"), ("RGB", "PPM")):
        np.testing.assert_allclose(array(encoded(red.convert(mode, palette=Image.Palette.ADAPTIVE), kind)), np.asarray(red, int), atol=4)
    assert (array(encoded(Image.new("1", (3, 2), 1))) == 255).all()


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame(kind):
    first, second = (Image.new("RGB", (20, 12), c) for c in ("red", "blue"))
    data = encoded(first, kind, save_all=True, append_images=[second], lossless=True)
    assert (array(data) == [255, 0, 0]).all()


# ---- what is no image ----
def test_the_kind_is_decided_by_the_bytes(tmp_path, scene):
    (tmp_path / "photo.jpg").write_bytes(encoded(scene, "PNG"))
    assert read_image(str(tmp_path / "photo.jpg")).size == scene.size
    for data, words in ((b"<html>", "it is none of PNG, JPEG"), (b"", "it is none of"), (b"%!PS-Adobe-3.0 EPSF-3.0\n", "none of")):
        with pytest.raises(UnreadableImage, match=words):
            read_image(data)
    for missing in ("absent.png", "."):
        with pytest.raises(UnreadableImage, match="No such file|Is a directory"):
            read_image(tmp_path / missing)


@pytest.mark.parametrize("kind", [*ALL, "GIF", "BMP"])
def test_cut_and_damaged_files(kind, rng, monkeypatch):
    """A part of a file is either refused or, where only trailing bytes are missing, the whole image; never a part of one."""
    image = Image.fromarray(rng.integers(0, 256, (40, 56, 3), dtype=np.uint8))
    data = encoded(image, kind, **ALL.get(kind, {}))
    whole = array(data)
    refused = 0
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as several packages leave it
    for cut in (*range(1, 60), *range(60, len(data), len(data) // 40)):
        try:
            np.testing.assert_array_equal(array(data[:cut]), whole)
        except UnreadableImage as error:
            refused += 1
            assert len(str(error).splitlines()) == 1
    assert refused > 90
    for _ in range(60):
        broken = bytearray(data)
        for at in rng.integers(0, len(data), 4):
            broken[at] = rng.integers(256)
        try:
            assert read_image(bytes(broken)).mode == "RGB"
        except UnreadableImage:
            pass


def test_more_pixels_than_the_limit():
    side = int(MAX_PIXELS**0.5) + 1
    for size in ((side, side), (side * 100, side * 100)):  # the second is over Pillow's own limit
        header = struct.pack(">II", *size)
        data = png(np.zeros((1, 1)), 8)
        data = data[:16] + header + data[24:29] + struct.pack(">I", zlib.crc32(b"IHDR" + header + data[24:29])) + data[33:]
        with pytest.raises(TooManyPixels, match=f"the limit is {MAX_PIXELS}"):
            read_image(data)
    with pytest.raises(TooManyPixels, match="it has 3 x 2 pixels, the limit is 5 in all"):
        read_image(png(GREY, 8), max_pixels=5)
