from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from animediffusion.models.augmentation.augment import (
    AugmentConfig,
    Chance,
    bend,
    draw_warp,
    fixed_batch,
    make_batch,
    recolor,
)
from animediffusion.models.tensors import to_tensor, to_uint8

NOTHING = AugmentConfig(cross_reference=0.0, rewarp=0.0, flip=0.0, recolor=0.0, soften=0.0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def chance(rows=4, seed=0):
    return Chance(rows, torch.device("cpu"), seeded(seed))


def smooth(rows=4, size=32):
    line = torch.linspace(-0.8, 0.8, size)
    image = torch.stack([line.expand(size, -1), line[:, None].expand(-1, size), line * line[:, None]])
    return image.expand(rows, -1, -1, -1).clone()


@pytest.mark.parametrize("complete", [True, False])
def test_a_batch_follows_from_the_generator(new_rows, complete):
    rows, config = new_rows(complete=complete), AugmentConfig()
    first, again, other = (make_batch(rows, config, seeded(seed)) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.reference, other.reference)


@pytest.mark.parametrize("complete", [True, False])
def test_a_batch_has_three_images_per_row_in_range(new_rows, complete):
    batch = make_batch(new_rows(complete=complete), AugmentConfig(), seeded())
    assert [tuple(image.shape) for image in batch] == [(4, 3, 16, 16), (4, 1, 16, 16), (4, 3, 16, 16)]
    assert all(image.dtype == torch.float32 and image.abs().max() < 1 + 1e-6 for image in batch)


def test_without_augmentation_the_datasets_own_images_are_taken(new_rows):
    rows = new_rows()
    batch = make_batch(rows, NOTHING, seeded())
    assert torch.equal(batch.target, to_tensor(rows["target"]))
    assert torch.equal(batch.sketch, to_tensor(rows["sketch"]))
    assert torch.equal(batch.reference, to_tensor(rows["reference"]))


def test_softened_lines_are_gray_and_the_paper_stays_white(new_rows):
    rows = new_rows(complete=False)
    rows["target"][:, :, :8], rows["target"][:, :, 8:] = 120, 250
    sharp, soft = (make_batch(rows, replace(NOTHING, soften=share), seeded()).sketch for share in (0.0, 1.0))
    assert set(sharp.unique().tolist()) == {-1.0, 1.0}
    assert ((soft > -0.9) & (soft < 0.9)).any()
    torch.testing.assert_close(soft[..., :2], sharp[..., :2])


def test_a_cross_reference_is_taken_where_there_is_one(new_rows):
    rows = new_rows()
    rows["has_cross"] = torch.tensor([True, False, True, False])
    batch = make_batch(rows, replace(NOTHING, cross_reference=1.0), seeded())
    for row, name in enumerate(["cross_reference", "reference"] * 2):
        assert torch.equal(batch.reference[row], to_tensor(rows[name])[row])


def test_a_target_alone_gets_line_art_and_a_bent_copy(new_rows):
    rows = new_rows(complete=False)
    batch = make_batch(rows, NOTHING, seeded())
    assert torch.equal(batch.target, to_tensor(rows["target"]))
    assert set(batch.sketch.unique().tolist()) == {-1.0, 1.0}
    assert not torch.allclose(batch.reference, batch.target, atol=0.1)


def test_target_and_sketch_are_mirrored_together(new_rows):
    rows = new_rows()
    batch = make_batch(rows, replace(NOTHING, flip=1.0), seeded())
    for image, name in zip(batch, ("target", "sketch", "reference"), strict=True):
        assert torch.equal(image, to_tensor(rows[name]).flip(-1))


def test_a_warp_of_size_zero_changes_nothing():
    images = smooth()
    torch.testing.assert_close(bend(images, *draw_warp(AugmentConfig(warp=0.0), chance())), images, rtol=0, atol=1e-3)


def test_a_warp_carries_each_control_point_to_where_it_was_moved():
    size, config = 65, AugmentConfig()
    line = torch.linspace(-1, 1, size)
    coordinates = torch.stack([line.expand(size, -1), line[:, None].expand(-1, size), torch.zeros(size, size)])
    bent = bend(coordinates[None], *draw_warp(config, chance(1)))
    shift = chance(1).uniform(-config.warp, config.warp, 16, 2).reshape(4, 4, 2)
    third = torch.tensor([-1, -1 / 3, 1 / 3, 1])
    points = torch.stack(torch.meshgrid(third, third, indexing="xy"), -1)
    found = F.grid_sample(bent, (points + shift)[None], align_corners=True)[0, :2].permute(1, 2, 0)
    # The inner four: those of the border may have left the image.
    torch.testing.assert_close(found[1:3, 1:3], points[1:3, 1:3], rtol=0, atol=0.01)
    assert shift[1:3, 1:3].abs().max() > 0.05


def test_a_warp_bends_each_row_its_own_way_and_keeps_the_range():
    images = smooth()
    bent = bend(images, *draw_warp(AugmentConfig(), chance()))
    assert (bent - images).abs().mean() > 0.02
    assert not torch.allclose(bent[0], bent[1], atol=0.02)
    assert bent.abs().max() <= images.abs().max() + 1e-5


def coordinates(size=65):
    """[1, 3, S, S]: x, y and 0 of each pixel."""
    line = torch.linspace(-1, 1, size)
    return torch.stack([line.expand(size, -1), line[:, None].expand(-1, size), torch.zeros(size, size)])[None]


def test_a_warp_also_rotates_scales_and_translates():
    config = AugmentConfig(warp=0.0, rotate=30.0, scale=(0.7, 1.4), translate=0.1)
    moved = bend(coordinates().expand(8, -1, -1, -1), *draw_warp(config, chance(8)))
    again = chance(8)
    again.uniform(0, 1, 16, 2)  # of the spline
    angle, unit, shift = again.uniform(-30, 30).deg2rad(), again.uniform(0, 1), again.uniform(-0.2, 0.2, 1, 2)
    zoom = 0.7 * 2**unit
    place = torch.rand(8, 5, 2, generator=seeded(5)) * 0.6 - 0.3
    x, y = place.unbind(-1)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    there = zoom[:, None, None] * torch.stack([cos * x - sin * y, sin * x + cos * y], -1) + shift
    found = F.grid_sample(moved, there[:, None], align_corners=True)[:, :2, 0].transpose(1, 2)
    torch.testing.assert_close(found, place, rtol=0, atol=2e-3)
    assert angle.abs().max() > 0.2
    assert 0.7 < zoom.min() < 1 < zoom.max() < 1.4


def test_switching_an_option_on_leaves_what_is_drawn_before_it_alone():
    config = AugmentConfig()
    plain, moved = (draw_warp(value, chance()) for value in (config, replace(config, rotate=10.0)))
    assert torch.equal(plain.moved, moved.moved)
    assert not torch.equal(plain.back, moved.back)


def test_the_diagonal_warp_is_symmetric_about_it(new_rows):
    rows = new_rows(complete=False)
    rows["target"] = to_uint8(smooth(4, 16))
    symmetric = (rows["target"].float() + rows["target"].float().transpose(1, 2)) / 2
    rows["target"] = symmetric.to(torch.uint8)
    bent = make_batch(rows, replace(NOTHING, warp_kind="diagonal"), seeded()).reference
    torch.testing.assert_close(bent, bent.transpose(2, 3), rtol=0, atol=1e-3)
    torch.testing.assert_close(bent[:, :, 0, 0], to_tensor(rows["target"])[:, :, 0, 0], rtol=0, atol=0.05)
    assert (bent - to_tensor(rows["target"])).abs().max() > 0.05


def test_a_shuffled_reference_has_the_same_pixels_in_other_places(new_rows):
    rows = new_rows()
    batch = make_batch(rows, replace(NOTHING, shuffle=1.0), seeded())
    before = to_tensor(rows["reference"])
    assert torch.equal(batch.target, to_tensor(rows["target"]))
    for row in range(4):
        assert not torch.equal(batch.reference[row], before[row])
        assert torch.equal(batch.reference[row].flatten(1).sort(1).values, before[row].flatten(1).sort(1).values)


def test_a_share_of_the_extracted_line_art_is_drawn_in_other_styles(new_rows):
    rows = {key: value.repeat(10, *[1] * (value.ndim - 1)) for key, value in new_rows(complete=False).items()}
    rows["target"] = to_uint8(smooth(40, 16))
    plain, half = (make_batch(rows, replace(NOTHING, line_styles=share), seeded()).sketch for share in (0.0, 0.5))
    changed = sum(not torch.equal(a, b) for a, b in zip(plain, half, strict=True))
    assert 5 < changed < 30


def test_given_line_art_keeps_its_style(new_rows):
    rows = new_rows()
    batch = make_batch(rows, replace(NOTHING, line_styles=1.0), seeded())
    assert torch.equal(batch.sketch, to_tensor(rows["sketch"]))


@pytest.mark.parametrize("values", [{"permute": 1.0}, {"gamma": 1.0}, {"permute": 0.5, "gamma": 0.5}])
def test_richer_recoloring_is_one_map_too(values):
    images = torch.rand(6, 3, 8, 8, generator=seeded()) * 2 - 1
    config = AugmentConfig(recolor=1.0, **values)
    target, reference = recolor(images, images.flip(-1), config, chance(6))
    plain, _ = recolor(images, images, AugmentConfig(recolor=1.0), chance(6))
    assert torch.equal(target, reference.flip(-1))
    assert not torch.allclose(target, plain, atol=0.05)
    assert target.abs().max() <= 1


def test_recoloring_is_one_map_for_target_and_reference():
    images = torch.rand(6, 3, 8, 8, generator=seeded()) * 2 - 1
    target, reference = recolor(images, images.flip(-1), AugmentConfig(recolor=1.0), chance(6))
    assert torch.equal(target, reference.flip(-1))
    assert not torch.allclose(target, images, atol=0.05)


def test_recoloring_rotates_hues_and_leaves_gray_gray():
    gray = torch.linspace(-1, 1, 16).expand(5, 3, 4, 16).clone()
    changed, _ = recolor(gray, gray, AugmentConfig(recolor=1.0), chance(5))
    torch.testing.assert_close(changed[:, 0], changed[:, 1], rtol=0, atol=1e-5)
    torch.testing.assert_close(changed[:, 1], changed[:, 2], rtol=0, atol=1e-5)


def test_recoloring_with_probability_zero_keeps_every_pixel():
    images = torch.rand(3, 3, 4, 4) * 2 - 1
    target, reference = recolor(images, images, AugmentConfig(recolor=0.0), chance(3))
    assert torch.equal(target, images)
    assert torch.equal(reference, images)


def test_the_same_track_takes_the_datasets_reference_or_a_bent_target(new_rows):
    rows = new_rows()
    rows["has_reference"] = torch.tensor([True, True, False, False])
    batch = fixed_batch(rows, "same", seeded())
    assert torch.equal(batch.target, to_tensor(rows["target"]))
    assert torch.equal(batch.reference[:2], to_tensor(rows["reference"])[:2])
    assert not torch.equal(batch.reference[2:], to_tensor(rows["reference"])[2:])


def test_the_cross_track_takes_the_second_view_or_recolors_both(new_rows):
    rows = new_rows()
    rows["has_cross"] = torch.tensor([True, True, False, False])
    batch = fixed_batch(rows, "cross", seeded())
    assert torch.equal(batch.target[:2], to_tensor(rows["target"])[:2])
    assert torch.equal(batch.reference[:2], to_tensor(rows["cross_reference"])[:2])
    assert not torch.allclose(batch.target[2:], to_tensor(rows["target"])[2:], atol=0.02)


@pytest.mark.parametrize("track", ["same", "cross"])
def test_an_evaluation_track_is_the_same_for_everybody(new_rows, track):
    rows = new_rows(complete=False)
    first, again = (fixed_batch(rows, track, seeded(7)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    "values",
    [
        {"flip": 1.5},
        {"recolor": -0.1},
        {"warp_points": 1},
        {"rotate": 200.0},
        {"scale": (0, 1)},
        {"warp_kind": "diagonal", "translate": 0.1},
    ],
)
def test_impossible_augmentation_is_refused(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        AugmentConfig(**values)
