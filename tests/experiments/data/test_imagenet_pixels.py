"""One image: decoded whatever it is, resized as torchvision does, cropped as drawn."""

import io
import random
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from experiments.data import synthetic
from experiments.data.imagenet import crops, pixels
from experiments.data.imagenet.pixels import DecodeError

PICTURE = synthetic.picture("train", 1, 0)


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decoded(content: bytes) -> np.ndarray:
    return pixels.decode(content).permute(1, 2, 0).numpy()


def levels_apart(a: np.ndarray, b: np.ndarray) -> int:
    assert a.shape == b.shape
    return int(np.abs(a.astype(int) - b.astype(int)).max())


@pytest.mark.parametrize(
    "content",
    [
        encoded(Image.fromarray(PICTURE)),
        encoded(Image.fromarray(PICTURE), progressive=True),
        encoded(Image.fromarray(PICTURE).convert("L")),
        encoded(Image.fromarray(PICTURE).convert("CMYK")),
        encoded(Image.fromarray(PICTURE), "PNG"),
        encoded(Image.fromarray(PICTURE).convert("RGBA"), "PNG"),
        encoded(Image.fromarray(PICTURE).convert("P"), "PNG"),
        encoded(Image.fromarray(PICTURE).convert("L").convert("1"), "PNG"),
        encoded(Image.fromarray(PICTURE), "WEBP"),
    ],
    ids=["jpeg", "progressive", "grey", "cmyk", "png", "alpha", "palette", "bits", "webp"],
)
def test_every_kind_of_image_becomes_the_rgb_that_pillow_makes_of_it(content):
    with Image.open(io.BytesIO(content)) as image:
        assert np.array_equal(decoded(content), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["I;16", "I;16B"])
def test_16_bit_images_keep_their_upper_8_bits(mode):
    deep = np.linspace(0, 65535, 60 * 50).reshape(60, 50).astype(np.uint16)
    kind = "PNG" if mode == "I;16" else "TIFF"
    content = encoded(
        Image.frombytes(
            mode,
            (50, 60),
            deep.astype(mode[1:].replace(";16B", ">u2").replace(";16", "<u2")).tobytes(),
        ),
        kind,
    )
    expected = np.repeat((deep >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    assert np.array_equal(decoded(content), expected)


def test_a_truncated_jpeg_is_refused_wherever_it_ends():
    content = encoded(Image.fromarray(PICTURE))
    ends = [*range(0, len(content), 97), len(content) - 2, len(content) - 1]
    for end in ends:
        with pytest.raises(DecodeError) as raised:
            pixels.decode(content[:end])
        assert "\n" not in str(raised.value) and " at 0x" not in str(raised.value)
    assert len(ends) > 20


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"<html>not found</html>", "no image in a format of"),
        (b"\xff\xd8\xff", "no image in a format of"),
        (bytes(100), "no image in a format of"),
    ],
)
def test_what_is_no_image_is_refused(content, reason):
    with pytest.raises(DecodeError, match=reason):
        pixels.decode(content)


def test_an_image_of_another_bomb_like_size_is_refused(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DecodeError, match="exceeds limit"):
        pixels.decode(encoded(Image.fromarray(PICTURE), "PNG"))


@pytest.mark.parametrize("kind", ["square", "shorter"])
@pytest.mark.parametrize("turned", [False, True])
def test_the_resize_is_torchvisions_up_to_one_level(kind, turned):
    image = Image.fromarray(PICTURE)
    if turned:
        image = image.transpose(Image.Transpose.ROTATE_90)
    content = encoded(image, "PNG")
    size = (40, 40) if kind == "square" else 40
    expected = np.asarray(transforms.Resize(size)(image))
    assert levels_apart(pixels.resized_pixels(content, kind, 40), expected) <= 1


def test_real_photographs_are_those_of_torchvision_and_pillow(real_images):
    resize = transforms.Resize((256, 256))
    apart = []
    for path in sorted(real_images.glob("*/*"))[:12]:
        with Image.open(path) as image:
            expected = np.asarray(resize(image.convert("RGB"))).astype(int)
        ours = pixels.resized_pixels(path.read_bytes(), "square", 256)
        assert levels_apart(ours, expected) <= 1
        apart.append(np.abs(ours - expected).mean())
    # one level in a hundred pixels or so is rounding
    assert np.mean(apart) < 0.05


def test_the_middle_is_torchvisions():
    for height, width in ((40, 40), (41, 57), (33, 32)):
        image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        out = np.empty((32, 32, 3), dtype=np.uint8)
        crops.centre(image, out)
        expected = transforms.CenterCrop(32)(torch.from_numpy(image).permute(2, 0, 1))
        assert np.array_equal(out, expected.permute(1, 2, 0).numpy())


def test_paper_crops_are_every_window_and_its_mirror_image_equally_often():
    image = np.arange(6 * 5 * 3, dtype=np.uint8).reshape(6, 5, 3)
    windows = {}
    for top in range(3):
        for left in range(2):
            window = image[top : top + 4, left : left + 4]
            windows[window.tobytes()] = 0
            windows[window[:, ::-1].tobytes()] = 0
    out = np.empty((4, 4, 3), dtype=np.uint8)
    draws = 2400
    for place in range(draws):
        crops.augment(image, "paper", crops.sample_stream(0, 0, place, "test"), out)
        windows[out.tobytes()] += 1
    assert len(windows) == 12
    # 200 expected of each, standard deviation 13.5
    assert min(windows.values()) > 140 and max(windows.values()) < 260


def test_inception_parts_have_the_distribution_of_torchvisions():
    height, width, draws = 60, 90, 1500
    image = torch.zeros(3, height, width)
    torch.manual_seed(0)
    theirs = np.array(
        [
            transforms.RandomResizedCrop.get_params(image, crops.PART_AREA, crops.PART_ASPECT)
            for _ in range(draws)
        ]
    )
    ours = np.array(
        [crops.random_part(height, width, random.Random(place)) for place in range(draws)]
    )
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()
    spread = theirs.std(axis=0) / np.sqrt(draws)
    assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) < 5 * spread).all()
    assert np.allclose(ours.std(axis=0), theirs.std(axis=0), rtol=0.1)


@pytest.mark.parametrize("shape", [(200, 10), (10, 200)])
def test_a_very_long_image_gives_its_middle_as_torchvision_does(shape):
    class Never(random.Random):
        def random(self):
            return 1.0  # the whole area, which no aspect allows

    theirs = transforms.RandomResizedCrop.get_params(
        torch.zeros(3, *shape), [1.0, 1.0], crops.PART_ASPECT
    )
    assert crops.random_part(*shape, Never()) == tuple(theirs)


def test_an_inception_crop_is_the_part_resized_by_torchvision():
    stream = crops.sample_stream(0, 0, 0, "test")
    top, left, height, width = crops.random_part(*PICTURE.shape[:2], stream)
    mirrored = stream.random() < 0.5
    out = np.empty((32, 32, 3), dtype=np.uint8)
    crops.augment(PICTURE, "inception", crops.sample_stream(0, 0, 0, "test"), out)
    part = Image.fromarray(PICTURE[top : top + height, left : left + width])
    expected = np.asarray(transforms.Resize((32, 32))(part))
    assert levels_apart(out, expected[:, ::-1] if mirrored else expected) <= 1


def test_streams_differ_by_seed_epoch_place_and_purpose():
    keys = [(0, 0, 0, "a"), (1, 0, 0, "a"), (0, 1, 0, "a"), (0, 0, 1, "a"), (0, 0, 0, "b")]
    firsts = [crops.sample_stream(*key).random() for key in keys]
    assert len(set(firsts)) == len(keys)
    assert firsts == [crops.sample_stream(*key).random() for key in keys]


def test_decoding_warns_of_nothing():
    content = encoded(Image.fromarray(PICTURE).convert("P"), "PNG", transparency=b"\x00\x01")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pixels.decode(content)
