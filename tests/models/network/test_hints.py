import torch

from animediffusion.models.network.hints import draw_hints, hint_planes

SIZE = 8
RED, BLUE = (255, 0, 0), (0, 0, 255)


def test_a_hint_is_a_square_of_its_color():
    mask, *color = draw_hints([(4, 2, RED)], SIZE)
    assert mask.nonzero().tolist() == [[y, x] for y in (1, 2, 3) for x in (3, 4, 5)]
    assert [plane[2, 4] for plane in color] == [1, -1, -1]
    assert all(not plane[mask == 0].any() for plane in color)


def test_a_hint_at_the_edge_is_cut_and_one_outside_is_left_out():
    assert draw_hints([(0, 7, RED)], SIZE)[0].sum() == 4
    assert not draw_hints([(-1, 3, RED), (3, 8, RED)], SIZE).any()


def test_a_later_hint_covers_an_earlier_one():
    planes = draw_hints([(3, 3, RED), (4, 3, BLUE)], SIZE)
    assert planes[1:, 3, 3].tolist() == [-1, -1, 1]
    assert planes[1:, 3, 2].tolist() == [1, -1, -1]


def test_no_hints_are_no_planes():
    assert draw_hints([], SIZE) is None


def test_rows_do_not_mix():
    points = torch.tensor([[[1, 1]], [[6, 6]]])
    planes = hint_planes(points, torch.ones(2, 1, 3), SIZE)
    assert planes[0, :, 1, 1].all()
    assert planes[1, :, 6, 6].all()
    assert planes.sum() == 2 * 4 * 9
