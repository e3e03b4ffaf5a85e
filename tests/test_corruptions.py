"""Each corruption does what it is called for, by the published numbers, and to each image alone."""

import colorsys
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import gaussian_filter, zoom

from convexprune.evaluation import CORRUPTIONS, Corruption, applicable, corrupted
from convexprune.evaluation.corruptions.blur import zoomed
from convexprune.evaluation.corruptions.noise import generators
from convexprune.evaluation.corruptions.weather import fog
from convexprune.solvers.errors import (
    ConvexPruneError,
    EmptyInput,
    InvalidInput,
    InvalidTolerance,
    MissingExtra,
    NonFinite,
    ShapeMismatch,
)

NAMES = tuple(CORRUPTIONS)
FIXED = {"gaussian_blur", "defocus_blur", "zoom_blur", "brightness", "contrast", "saturate", "jpeg", "pixelate"}
UNIT = 1 / 255
# Severities at which the published parameters take an image no farther from the clean one than the severity below.
NO_FARTHER = {
    "glass_blur": {2, 3, 5},  # a wider Gaussian filter hides what the exchange of pixels does
    "motion_blur": {4},  # the longer line has no weight at its end
    "frost": {4, 5},  # less of the image rather than more of the texture
    "spatter": {4},  # from water to mud
    "saturate": {3},  # from paler to more colourful
    "elastic": {2, 3, 4, 5},  # a milder affine map
}
FROST = [np.random.default_rng(index).integers(0, 256, (60, 50, 3), np.uint8) for index in range(3)]


def scenes(count, channels=3, height=32, width=32, seed=0):
    """Images as cameras make them: the smoother a pattern, the stronger it is, and much the same in all channels."""
    rng, shape = np.random.default_rng(seed), (count, channels, height, width)
    layers = [
        size
        * gaussian_filter(rng.normal(size=shape) + 2 * rng.normal(size=(count, 1, height, width)), (0, 0, size, size))
        for size in (0.5, 1, 2, 4, 8)
    ]
    total = sum(layers)
    scaled = 0.5 + 0.2 * (total - total.mean((1, 2, 3), keepdims=True)) / total.std((1, 2, 3), keepdims=True)
    return torch.from_numpy(np.rint(np.clip(scaled, 0, 1) * 255).astype(np.float32) / 255)


SCENES = scenes(48)


def flat(value, count=4, channels=3, size=32):
    return torch.full((count, channels, size, size), round(value * 255) / 255)


def made(images, name, severity, **options):
    return corrupted(images, name, severity, textures=FROST if name == "frost" else None, **options)


@pytest.mark.parametrize("name", NAMES)
def test_images_are_of_8_bits_and_the_callers_stay_as_they_were(name):
    images = SCENES.clone()
    for severity in range(1, 6):
        found = made(images[:4], name, severity)
        assert found.shape == (4, 3, 32, 32)
        assert found.dtype == torch.float32
        assert found.min() >= 0
        assert found.max() <= 1
        assert torch.equal(found, (found * 255).round() / 255)
        assert not torch.equal(found, images[:4])
    assert torch.equal(images, SCENES)
    assert torch.equal(made(images, name, 0), images)


@pytest.mark.parametrize("name", NAMES)
def test_random_numbers_are_those_of_the_seed(name):
    images = SCENES[:3]
    first = made(images, name, 3, seed=5)
    assert torch.equal(made(images, name, 3, seed=5), first)
    assert torch.equal(made(images, name, 3, seed=6), first) == (name in FIXED)
    twice = made(images[:1].repeat(2, 1, 1, 1), name, 3)
    assert torch.equal(twice[0], twice[1]) == (name in FIXED)


def test_no_two_images_share_random_numbers():
    drawn = {
        one.random()
        for seed in range(3)
        for name in ("snow", "fog")
        for severity in (1, 2)
        for one in generators(seed, name, severity, range(20))
    }
    assert len(drawn) == 3 * 2 * 2 * 20


@pytest.mark.parametrize("name", NAMES)
def test_an_image_is_corrupted_alike_in_another_block(name):
    images = scenes(4).repeat(90, 1, 1, 1)  # more than are worked on at a time
    whole = made(images, name, 5)
    assert torch.equal(made(images[335:], name, 5, start=335), whole[335:])
    assert torch.equal(made(images[340:341].double(), name, 5, start=340), whole[340:341])


@settings(max_examples=60)
@given(
    st.sampled_from(NAMES),
    st.integers(1, 5),
    st.sampled_from([1, 3]),
    st.tuples(st.integers(8, 40), st.integers(8, 40)),
    st.integers(1, 5),
    st.integers(0, 10**6),
)
def test_an_image_of_any_size_is_corrupted_alike_in_any_batch(name, severity, channels, size, cut, start):
    if name == "saturate" and channels == 1:
        name = "contrast"
    images = torch.rand(6, channels, *size, generator=torch.Generator().manual_seed(start))
    whole = made(images, name, severity, start=start)
    assert whole.shape == images.shape
    assert torch.equal(made(images[:cut], name, severity, start=start), whole[:cut])
    assert torch.equal(made(images[cut:], name, severity, start=start + cut), whole[cut:])
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(made(last, name, severity, start=start), whole)


@pytest.mark.parametrize("name", NAMES)
def test_images_are_farther_from_the_clean_ones_with_severity(name):
    distances = [(made(SCENES, name, severity) - SCENES).abs().mean().item() for severity in range(1, 6)]
    no_farther = {severity for severity in range(2, 6) if distances[severity - 1] < 1.03 * distances[severity - 2]}
    assert no_farther == NO_FARTHER.get(name, set())


HALF = 128 / 255


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize(
    ("name", "variances"),
    [
        ("gaussian_noise", [deviation**2 for deviation in (0.04, 0.06, 0.08, 0.09, 0.1)]),
        ("speckle_noise", [(HALF * deviation) ** 2 for deviation in (0.06, 0.1, 0.12, 0.16, 0.2)]),
        ("shot_noise", [HALF / photons for photons in (500, 250, 100, 75, 50)]),
    ],
)
def test_noise_has_the_published_variance(name, variances, severity):
    noise = corrupted(flat(HALF, 16), name, severity) - HALF
    assert noise.mean().item() == pytest.approx(0, abs=0.003)
    assert noise.var().item() == pytest.approx(
        variances[severity - 1] + UNIT**2 / 12, rel=0.05
    )  # 250 photons alias with 8 bits


@pytest.mark.parametrize(("severity", "amount"), [(1, 0.01), (2, 0.02), (3, 0.03), (4, 0.05), (5, 0.07)])
def test_impulses_are_black_and_white_alike(severity, amount):
    found = corrupted(flat(HALF, 64), "impulse_noise", severity)
    for value in (0, 1):
        assert (found == value).double().mean().item() == pytest.approx(amount / 2, rel=0.1)
    assert ((found == 0) | (found == 1) | (found == flat(HALF, 64))).all()


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize("name", [name for name in NAMES if CORRUPTIONS[name].category == "blur"] + ["elastic"])
def test_blurs_keep_what_is_flat(name, severity):
    assert torch.equal(corrupted(flat(0.3), name, severity), flat(0.3))


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize("name", ["gaussian_blur", "defocus_blur", "motion_blur"])
def test_blurs_keep_the_mean_and_smooth(name, severity):
    images = flat(0.4, len(SCENES), size=72)
    images[:, :, 20:52, 20:52] = SCENES
    found = corrupted(images, name, severity)
    assert torch.allclose(found.mean((2, 3)), images.mean((2, 3)), atol=UNIT / 10)
    for axis in (2, 3):
        assert found.diff(dim=axis).abs().mean() < images.diff(dim=axis).abs().mean()


def test_defocus_is_a_disk():
    point = torch.zeros(1, 1, 9, 9)
    point[0, 0, 4, 4] = 1
    box = corrupted(point, "defocus_blur", 5)[0, 0]
    assert torch.allclose(box[3:6, 3:6], torch.tensor(1 / 9), atol=UNIT / 2)
    assert box.sum().item() == pytest.approx(1, abs=9 * UNIT / 2)
    cross = corrupted(point, "defocus_blur", 4)[0, 0]
    assert torch.allclose(cross[4, 3:6], torch.tensor(0.2), atol=UNIT / 2)
    assert torch.allclose(cross[3:6, 4], torch.tensor(0.2), atol=UNIT / 2)


def test_glass_takes_values_of_neighbours_above_and_to_the_left():
    found = corrupted(SCENES, "glass_blur", 1)  # its Gaussian filter is narrower than a pixel
    choices = [SCENES[:, :, 2 - y : 32 - y, 2 - x : 32 - x] for y in (0, 1) for x in (0, 1)]
    equal = torch.stack([(found[:, :, 2:, 2:] == choice).all(1) for choice in choices])
    assert equal.any(0).all()
    assert (equal.double().mean((1, 2, 3)) > 0.24).all()
    assert torch.equal(found[:, :, :2], SCENES[:, :, :2])
    assert torch.equal(found[:, :, :, :2], SCENES[:, :, :, :2])


def test_motion_is_along_a_line_near_the_horizontal():
    point = torch.zeros(50, 1, 41, 41)
    point[:, :, 20, 20] = 1
    trace = corrupted(point, "motion_blur", 5)[:, 0].double()
    rows, columns = torch.meshgrid(torch.arange(41) - 20.0, torch.arange(41) - 20.0, indexing="ij")
    down = (trace * rows).sum((1, 2)) / trace.sum((1, 2))
    along = (trace * columns).sum((1, 2)) / trace.sum((1, 2))
    assert torch.allclose(trace.sum((1, 2)), torch.ones(50).double(), atol=19 * UNIT / 2)
    assert (along < -1).all()  # each pixel is a mean of those to its right
    assert (down.abs() <= along.abs() + 0.3).all()
    assert down.min() < -0.5
    assert down.max() > 0.5


@pytest.mark.parametrize("factor", [1.0, 1.01, 1.04, 1.2, 1.75, 2.25])
@pytest.mark.parametrize("size", [8, 28, 32])
def test_enlarging_is_that_of_scipy(factor, size):
    image = scenes(1, 1, size, size)[0, 0].numpy()
    kept = int(np.ceil(size / factor))
    top = (size - kept) // 2
    larger = zoom(image[top : top + kept, top : top + kept], factor, order=1)
    trim = (len(larger) - size) // 2
    assert np.allclose(zoomed(image, factor), larger[trim : trim + size, trim : trim + size], atol=1e-6)


@pytest.mark.parametrize("severity", range(1, 6))
def test_brightness_adds_to_the_value_alone(severity):
    added = CORRUPTIONS["brightness"].parameters[severity - 1]
    found, value = corrupted(SCENES, "brightness", severity), SCENES.amax(1)
    assert torch.allclose(found.amax(1), (value + added).clamp(max=1), atol=UNIT)
    for before, after in zip(SCENES[0].flatten(1).T.tolist(), found[0].flatten(1).T.tolist(), strict=True):
        hue, saturation, level = colorsys.rgb_to_hsv(*before)
        assert colorsys.hsv_to_rgb(hue, saturation, min(level + added, 1)) == pytest.approx(after, abs=UNIT)
    assert torch.allclose(corrupted(flat(0), "brightness", severity), flat(added), atol=UNIT)
    grey = SCENES[:, :1]
    assert torch.allclose(corrupted(grey, "brightness", severity), (grey + added).clamp(max=1), atol=UNIT)


@pytest.mark.parametrize("severity", range(1, 6))
def test_saturate_changes_the_saturation_alone(severity):
    scale, shift = CORRUPTIONS["saturate"].parameters[severity - 1]
    images = torch.cat([SCENES[:1], flat(0.6, 1), flat(0, 1)], 3)
    found = corrupted(images, "saturate", severity)
    for before, after in zip(images[0].flatten(1).T.tolist(), found[0].flatten(1).T.tolist(), strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*before)
        expected = colorsys.hsv_to_rgb(hue, min(scale * saturation + shift, 1), value)
        assert expected == pytest.approx(after, abs=UNIT)


@pytest.mark.parametrize("severity", range(1, 6))
def test_contrast_shrinks_deviations_from_the_mean_of_a_channel(severity):
    kept = CORRUPTIONS["contrast"].parameters[severity - 1]
    found, means = corrupted(SCENES, "contrast", severity), SCENES.mean((2, 3), keepdim=True)
    assert torch.allclose(found - means, kept * (SCENES - means), atol=0.51 * UNIT)


@pytest.mark.parametrize("severity", range(1, 6))
def test_fog_lies_between_nothing_and_its_thickness(severity):
    thickness, _ = CORRUPTIONS["fog"].parameters[severity - 1]
    white = corrupted(flat(1), "fog", severity)
    assert white.amin((1, 2, 3)).numpy() == pytest.approx(1 / (1 + thickness), abs=UNIT)
    assert torch.equal(white.amax((1, 2, 3)), torch.ones(4))
    assert torch.equal(white[:, 0], white[:, 2])
    assert torch.equal(corrupted(flat(0), "fog", severity), flat(0))


def test_fog_is_thick_in_patches():
    """A fractal: neighbours differ far less than points far apart, and less than in fog of a slower decay."""
    rough = []
    for severity in (1, 5):
        cloud = corrupted(flat(1, 40, 1), "fog", severity)
        near, far = cloud.diff(dim=3).abs().mean(), (cloud[..., 16:] - cloud[..., :16]).abs().mean()
        rough.append(near / far)
    assert rough[0] < rough[1] < 0.6


def test_a_cloud_of_one_bump_is_symmetric_on_its_torus():
    """Each point is the mean of those around it, and of nothing else."""
    drawn = np.full((32, 32), 0.5, np.float32)
    drawn[16, 16] = 1
    chance = SimpleNamespace(random=lambda *_: drawn)
    cloud = fog(np.ones((1, 1, 32, 32), np.float32), (1, 3), iter([chance]))[0, 0]
    assert cloud.max() == cloud[16, 16]
    assert cloud[16, 0] == cloud[16, 16] - 0.25  # from 0.5 to 1, and halfway between two bumps and two corners
    mirrored = -np.arange(32) % 32
    for same in (cloud.T, cloud[mirrored], cloud[:, mirrored]):
        assert np.array_equal(same, cloud)


def test_snow_is_of_single_flakes():
    found = corrupted(flat(0), "snow", 1)
    assert (found < 0.05 * 0.5 + UNIT).double().mean() > 0.5  # what is between them is only paler


@pytest.mark.parametrize("severity", range(1, 6))
def test_snow_falls_twice_and_never_darkens(severity):
    assert (corrupted(SCENES, "snow", severity) >= SCENES).all()
    found = corrupted(flat(0), "snow", severity)
    assert torch.equal(found, found.rot90(2, (2, 3)))
    assert torch.equal(found[:, :1].expand_as(found), found)
    assert found.amax((1, 2, 3)).min() > found.amin() + 0.1


@pytest.mark.parametrize("severity", range(1, 6))
def test_water_shines_and_mud_covers(severity):
    found = corrupted(SCENES, "spatter", severity)
    touched = (found != SCENES).any(1)
    assert 0.001 < touched.double().mean() < 0.5
    if severity <= 3:
        assert (found >= SCENES).all()
        added = corrupted(flat(0), "spatter", severity)
        strength = CORRUPTIONS["spatter"].parameters[severity - 1][4]
        assert added.amax((2, 3)).max(0).values.numpy() == pytest.approx(
            strength * np.array([175, 238, 238]) / 255, abs=UNIT
        )
    else:
        brown = torch.tensor([63.0, 42, 20])[:, None, None] / 255
        assert ((found - brown).abs() <= 0.2 * (SCENES - brown).abs() + UNIT)[touched[:, None].expand_as(found)].all()


def test_spatter_without_a_drop_changes_nothing(monkeypatch):
    dry = replace(CORRUPTIONS["spatter"], parameters=((0.1, 0.01, 0.7, 0.7, 0.5, False),))
    monkeypatch.setitem(CORRUPTIONS, "spatter", dry)
    assert torch.equal(corrupted(SCENES, "spatter", 1), SCENES)


@pytest.mark.parametrize("severity", range(1, 6))
def test_frost_is_a_part_of_a_texture(severity):
    own, ice = CORRUPTIONS["frost"].parameters[severity - 1]
    even = [np.full((32, 40, 3), (10, 100, 200), np.uint8)]
    expected = own * SCENES + ice * torch.tensor([10.0, 100, 200])[:, None, None] / 255
    assert torch.allclose(corrupted(SCENES, "frost", severity, textures=even), expected.clamp(max=1), atol=0.51 * UNIT)
    luma = 0.299 * 10 + 0.587 * 100 + 0.114 * 200
    expected = own * SCENES[:, :1] + ice * luma / 255
    found = corrupted(SCENES[:, :1], "frost", severity, textures=even)
    assert torch.allclose(found, expected.clamp(max=1), atol=0.51 * UNIT)


def test_frost_shows_every_texture():
    shades = [np.full((33, 33, 3), shade, np.uint8) for shade in (0, 100, 200)]
    found = corrupted(flat(0, 40), "frost", 5, textures=shades)
    assert set((found * 255).round().int().unique().tolist()) == {0, 45, 90}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("severity", range(1, 6))
def test_jpeg_is_that_of_pillow_and_changes_little_the_second_time(channels, severity, tmp_path):
    images = SCENES[:8, :channels]
    once = corrupted(images, "jpeg", severity)
    twice = corrupted(once, "jpeg", severity)
    assert (twice - once).abs().mean() < 0.3 * (once - images).abs().mean()
    pixels = (images[0] * 255).round().byte().permute(1, 2, 0).numpy()
    path = tmp_path / "image.jpeg"
    Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(
        path, quality=CORRUPTIONS["jpeg"].parameters[severity - 1]
    )
    expected = torch.from_numpy(np.array(Image.open(path))).reshape(32, 32, channels).permute(2, 0, 1) / 255
    assert torch.equal(once[0], expected)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (28, 28), (24, 40)])
@pytest.mark.parametrize("severity", range(1, 6))
def test_pixelate_is_that_of_pillow(severity, height, width):
    images, share = scenes(2, 3, height, width), CORRUPTIONS["pixelate"].parameters[severity - 1]
    found = corrupted(images, "pixelate", severity)
    picture = Image.fromarray((images[0] * 255).round().byte().permute(1, 2, 0).numpy())
    small = picture.resize((int(width * share), int(height * share)), Image.BOX)
    expected = torch.from_numpy(np.array(small.resize((width, height), Image.BOX))).permute(2, 0, 1) / 255
    assert torch.allclose(found[0], expected, atol=1.01 * UNIT)  # Pillow rounds twice
    assert (found.diff(dim=3) == 0).all(1).any()


def test_an_affine_map_keeps_what_is_linear():
    ramp = (torch.arange(48) / 64 + 0.1).expand(20, 1, 48, 48)
    inside = corrupted(ramp, "elastic", 1)[:, 0, 12:36, 12:36]  # of severity 1, which displaces nothing else
    assert inside.diff(n=2, dim=2).abs().max() < 2.1 * UNIT
    slopes = (inside[:, :, -1] - inside[:, :, 0]).mean(1) / (23 / 64)
    assert slopes.mean().item() == pytest.approx(1, abs=0.1)
    assert slopes.std() > 0.02
    bent = corrupted(ramp, "elastic", 5)[:, 0, 12:36, 12:36]
    assert bent.diff(n=2, dim=2).abs().max() > 3 * UNIT


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"images": torch.full((1, 3, 8, 8), float("nan"))}, NonFinite, "192 of 192 entries are NaN"),
        ({"images": torch.full((1, 3, 8, 8), float("inf"))}, NonFinite, "NaN or infinite"),
        ({"images": torch.full((1, 3, 8, 8), 255)}, InvalidInput, r"found 255 to 255; divide them by 255"),
        ({"images": torch.full((1, 3, 8, 8), -1.5)}, InvalidInput, r"found -1\.5 to -1\.5; undo their normalisation"),
        ({"images": torch.zeros(3, 8, 8)}, ShapeMismatch, r"found shape \[3, 8, 8\]; .*images\[None\] a batch"),
        ({"images": torch.zeros(1, 8, 8, 3)}, ShapeMismatch, r"found shape \[1, 8, 8, 3\]; .*permute\(0, 3, 1, 2\)"),
        ({"images": torch.zeros(1, 3, 8, 7)}, ShapeMismatch, r"at least 8 × 8 pixels, found shape \[1, 3, 8, 7\]"),
        ({"images": torch.zeros(0, 3, 8, 8)}, EmptyInput, "at least one"),
        ({"name": "rain"}, InvalidInput, "no corruption named 'rain'. Known: gaussian_noise, .*elastic"),
        ({"severity": 6}, InvalidInput, r"from 0 \(clean\) to 5, found 6"),
        ({"severity": -1}, InvalidTolerance, "severity: .* found -1"),
        ({"severity": 1.5}, InvalidTolerance, "severity: .* found 1.5"),
        ({"seed": -1}, InvalidTolerance, "seed: .* found -1"),
        ({"start": 0.5}, InvalidTolerance, "start: .* found 0.5"),
        ({"name": "frost"}, InvalidInput, "frost: expected textures, found none"),
        ({"name": "frost", "textures": []}, InvalidInput, "frost: expected textures, found none"),
        (
            {"name": "frost", "textures": [np.zeros((9, 7, 3), np.uint8)]},
            ShapeMismatch,
            r"at least 8 × 8 pixels, found shape \[9, 7, 3\]",
        ),
        ({"name": "frost", "textures": [np.zeros((9, 9), np.uint8)]}, ShapeMismatch, r"found shape \[9, 9\]"),
        ({"name": "frost", "textures": [np.zeros((9, 9, 3))]}, InvalidInput, "expected uint8, found float64"),
        ({"name": "saturate", "images": torch.zeros(1, 1, 8, 8)}, InvalidInput, "3 channels, found 1"),
    ],
)
def test_what_cannot_be_corrupted_is_named(change, error, says):
    arguments = {"images": torch.full((1, 3, 8, 8), 0.5), "name": "contrast", "severity": 1}
    with pytest.raises(error, match=says) as caught:
        corrupted(**arguments | change)
    assert isinstance(caught.value, ConvexPruneError)


def test_jpeg_needs_pillow(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(MissingExtra, match=r'pip install "convexprune\[evaluation\]"'):
        corrupted(SCENES, "jpeg", 1)
    for name in set(NAMES) - {"jpeg"}:
        made(SCENES[:1], name, 1)


def test_what_is_applicable_depends_on_channels_and_textures():
    assert {name for name in NAMES if not applicable(name, 3)} == {"frost"}
    assert {name for name in NAMES if not applicable(name, 1, FROST)} == {"saturate"}
    with pytest.raises(InvalidInput, match="no corruption named 'rain'"):
        applicable("rain", 3)


@pytest.mark.parametrize(
    ("function", "error", "says"),
    [
        (lambda images, size, chance: images[..., :-size], ShapeMismatch, r"dark: expected shape \[48, 3, 32, 32\]"),
        (lambda images, size, chance: images * np.nan, NonFinite, "dark: .* NaN"),
        (lambda images, size, chance: np.multiply(images, size, out=images), ValueError, "read-only"),
    ],
)
def test_one_s_own_corruption_is_checked(monkeypatch, function, error, says):
    monkeypatch.setitem(CORRUPTIONS, "dark", Corruption("dark", "weather", (1,), function))
    with pytest.raises(error, match=says):
        corrupted(SCENES, "dark", 1)


def test_one_s_own_corruption_is_made_like_the_others(monkeypatch):
    def dark(images, lost, chance):
        return images - lost * np.stack([one.random((1, 1, 1)) for one in chance])

    monkeypatch.setitem(CORRUPTIONS, "dark", Corruption("dark", "weather", (0.1, 0.2), dark))
    found = corrupted(SCENES, "dark", 2)
    assert torch.equal(corrupted(SCENES[7:], "dark", 2, start=7), found[7:])
    assert (found <= SCENES).all()
    with pytest.raises(InvalidInput, match="to 2, found 3"):
        corrupted(SCENES, "dark", 3)
