from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from animediffusion.models.augmentation.augment import (
    HINT_JITTER,
    MANY_HINTS,
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
    assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))
    assert not torch.equal(first.reference, other.reference)


@pytest.mark.parametrize("complete", [True, False])
def test_a_batch_has_three_images_per_row_in_range(new_rows, complete):
    batch = make_batch(new_rows(complete=complete), AugmentConfig(), seeded())
    assert [tuple(image.shape) for image in batch[:3]] == [(4, 3, 16, 16), (4, 1, 16, 16), (4, 3, 16, 16)]
    assert all(image.dtype == torch.float32 and image.abs().max() < 1 + 1e-6 for image in batch[:3])


def test_without_augmentation_the_datasets_own_images_are_taken(new_rows):
    rows = new_rows()
    batch = make_batch(rows, NOTHING, seeded())
    assert torch.equal(batch.target, to_tensor(rows["target"]))
    assert torch.equal(batch.sketch, to_tensor(rows["sketch"]))
    assert torch.equal(batch.reference, to_tensor(rows["reference"]))


def test_a_share_of_the_line_art_is_extracted_although_the_dataset_has_some(new_rows):
    rows = new_rows(rows=64)
    own, drawn = (make_batch(rows, replace(NOTHING, extract=share), seeded()).sketch for share in (0.0, 1.0))
    mixed = make_batch(rows, replace(NOTHING, extract=0.5), seeded()).sketch
    is_own, is_drawn = ((mixed == other).flatten(1).all(1) for other in (own, drawn))
    assert 16 < is_own.sum() < 48
    assert (is_own ^ is_drawn).all()


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
    for name in ("target", "sketch", "reference"):
        assert torch.equal(getattr(batch, name), to_tensor(rows[name]).flip(-1))


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


def test_reduced_line_art_is_thinner_and_gray_and_has_specks_in_dark_areas_alone(new_rows):
    picture = torch.full((4, 64, 64, 3), 200, dtype=torch.uint8)
    picture[:, :, 40:] = 20
    names = ("target", "reference", "cross_reference", "sketch")
    rows = new_rows(complete=False) | dict.fromkeys(names, picture) | {"sketch": picture[..., 0]}
    plain, reduced = (make_batch(rows, replace(NOTHING, reduce=share), seeded()).sketch for share in (0.0, 1.0))
    edge = slice(30, 46)
    assert set(plain.unique().tolist()) <= {-1.0, 1.0}
    assert ((reduced > -0.9) & (reduced < 0.9)).any()
    assert (1 - reduced[..., edge]).sum() < (1 - plain[..., edge]).sum()
    assert (reduced[..., :30] == 1).all()
    assert (reduced[..., 46:] < 1).any()


def test_given_line_art_keeps_its_style(new_rows):
    rows = new_rows()
    batch = make_batch(rows, replace(NOTHING, line_styles=1.0, reduce=1.0), seeded())
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
    assert all(torch.equal(a, b) for a, b in zip(first[:3], again[:3], strict=True))


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
def test_impossible_augmentation_raises_value_error(values):
    with pytest.raises(ValueError, match=next(iter(values))):
        AugmentConfig(**values)


HINTED = replace(NOTHING, hints=1.0, wrong_reference=0.0)


def test_hints_have_the_targets_color_and_avoid_lines(new_rows):
    rows = new_rows(rows=32)
    rows["target"][:] = torch.tensor([200, 40, 90], dtype=torch.uint8)
    rows["sketch"][:] = 255
    rows["sketch"][:, :, 8:] = 0
    batch = make_batch(rows, HINTED, seeded())
    mask, color = batch.hints[:, :1], batch.hints[:, 1:]
    assert 0 < mask.mean() < 0.5
    assert not mask[..., 8:].any()
    assert ((color - batch.target).abs() * mask).max() <= HINT_JITTER + 1e-6
    assert torch.equal(mask.flatten(1).any(1), color.flatten(1).any(1))


def test_hints_are_few_as_often_as_many(new_rows):
    rows = new_rows(rows=64)
    rows["sketch"][:] = 255
    marked = make_batch(rows, HINTED, seeded()).hints[:, 0].mean((1, 2))
    assert (marked <= 9 * 2 / 256).float().mean() > 0.15
    assert (marked > 0.5).any()


def test_only_a_share_of_the_rows_gets_hints_and_only_rows_with_many_get_wrong_references(new_rows):
    rows = new_rows(rows=128)
    rows["sketch"][:] = 255
    batch = make_batch(rows, replace(NOTHING, hints=0.5, wrong_reference=0.5), seeded())
    plain = make_batch(rows, NOTHING, seeded())
    has, wrong = batch.hints.flatten(1).any(1), (batch.reference != plain.reference).flatten(1).any(1)
    assert 32 < has.sum() < 96
    assert 4 < wrong.sum() < 28
    assert not (wrong & ~has).any()
    assert torch.equal(batch.reference[wrong], plain.reference.roll(1, 0)[wrong])


def test_a_row_with_few_hints_keeps_its_reference(new_rows, monkeypatch):
    rows = new_rows(rows=64)
    rows["sketch"][:] = 255
    config, plain = replace(HINTED, wrong_reference=1.0), make_batch(rows, NOTHING, seeded())

    def kept():
        return (make_batch(rows, config, seeded()).reference == plain.reference).flatten(1).all(1)

    # A hint marks at most 9 pixels, so one mark is one hint, and more than 9 for each of MANY_HINTS are more hints.
    marked = make_batch(rows, config, seeded()).hints[:, 0].flatten(1).sum(1)
    one, many = marked <= 9, marked > 9 * MANY_HINTS
    assert one.sum() > 4
    assert many.sum() > 4
    assert kept()[one].all()
    assert not kept()[many].any()
    monkeypatch.setattr("animediffusion.models.augmentation.augment.MANY_HINTS", 1)
    assert not kept().any()


def test_hints_leave_all_other_random_numbers_alone(new_rows):
    config = AugmentConfig(line_styles=0.5, shuffle=0.5)
    plain, batch = (
        make_batch(new_rows(), config, seeded()),
        make_batch(new_rows(), replace(config, hints=1.0, wrong_reference=0.0), seeded()),
    )
    assert plain.hints is None
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], batch[:3], strict=True))


def test_two_views_show_what_the_other_lacks(new_rows):
    rows = new_rows(rows=64)
    rows["target"][:] = 255
    rows["reference"][:] = 255
    batch = make_batch(rows, replace(NOTHING, two_views=1.0), seeded())
    first, second = ((view > 0.999).all(1).flatten(1) for view in batch.references)
    halves = ~(first.all(1) & second.all(1))
    assert 16 < halves.sum() < 48
    assert (first | second)[halves].all()
    assert not (first & second)[halves].any()


def test_two_views_get_one_color_map_and_a_share_is_another_rows(new_rows):
    rows = new_rows(rows=32)
    rows["target"][:] = torch.arange(32, dtype=torch.uint8).reshape(32, 1, 1, 1) * 8
    rows["reference"][:] = rows["target"]
    batch = make_batch(rows, replace(NOTHING, two_views=1.0, recolor=1.0, gamma=1.0), seeded())
    same = [(view == batch.target).all(1).flatten(1).float().mean(1) for view in batch.references]
    assert all(((share == 0) | (share > 0.05)).all() for share in same)
    assert all(2 <= (share == 0).sum() <= 16 for share in same)
    assert not ((same[0] == 0) & (same[1] == 0)).any()


def test_one_view_is_the_rule(new_rows):
    batch = make_batch(new_rows(), AugmentConfig(), seeded())
    assert batch.second is None
    assert len(batch.references) == 1
    assert batch.rows(slice(2)).target.shape[0] == 2
