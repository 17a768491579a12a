import torch

from animediffusion.models.hint_spread import spread_hints
from animediffusion.models.network.hints import draw_hints

SIZE = 16
SKIN, HAIR, RED = (230, 200, 180), (60, 40, 120), (255, 0, 0)


def color(value):
    return torch.tensor(value)[:, None, None] / 127.5 - 1


def halves():
    """A picture of one row: skin on the left, hair on the right."""
    picture = color(SKIN).repeat(1, SIZE, SIZE)
    picture[..., SIZE // 2 :] = color(HAIR)
    return picture[None]


def paper():
    return torch.ones(1, 1, SIZE, SIZE)


def spread(denoiser, picture, *hints, sketch=None):
    """The picture with hints, and how much it changed at each pixel, in levels."""
    made = spread_hints(denoiser, paper() if sketch is None else sketch, picture, draw_hints(hints, SIZE)[None])
    return made, (made - picture).abs().amax(1)[0] * 127.5


def without_matcher(denoiser):
    denoiser.network.matcher = None
    return denoiser


def test_a_hint_colors_what_looks_alike_and_hardly_anything_else(new_denoiser):
    made, change = spread(without_matcher(new_denoiser()), halves(), (12, 3, RED))
    wanted = (color(RED) - color(HAIR)).abs().amax() * 127.5
    assert change[:, 9:].min() > 0.5 * wanted
    assert change[:, :7].max() < 0.1 * wanted
    assert (made[0, 0, :, 9:] > 0.2).all(), "the hair is red, also where no hint is"


def test_a_hint_of_the_color_that_is_there_changes_nothing(new_denoiser):
    _, change = spread(new_denoiser(), halves(), (12, 3, HAIR), (3, 3, SKIN))
    assert change.max() < 0.01


def test_more_hints_than_are_used_cost_no_hint_at_an_edge(new_denoiser, monkeypatch):
    monkeypatch.setattr("animediffusion.models.hint_spread.MOST_POINTS", 2)
    points = [(0, 0, RED), *((x, y, HAIR) for x in (9, 12) for y in (5, 9)), (15, 15, HAIR)]
    _, change = spread(new_denoiser(), halves(), *points)
    assert change[0, 0] > 10


def test_a_hint_on_a_line_counts_for_nothing(new_denoiser):
    sketch = paper()
    sketch[..., 2:5, 11:14] = -1
    _, change = spread(new_denoiser(), halves(), (12, 3, RED), sketch=sketch)
    assert not change.any()


def test_a_row_without_hints_stays_as_it_is_and_rows_do_not_disturb_each_other(new_denoiser):
    denoiser, picture = new_denoiser(), halves().repeat(2, 1, 1, 1)
    hints = torch.stack([torch.zeros(4, SIZE, SIZE), draw_hints([(12, 3, RED)], SIZE)])
    made = spread_hints(denoiser, paper().repeat(2, 1, 1, 1), picture, hints)
    assert torch.equal(made[0], picture[0])
    torch.testing.assert_close(made[1:], spread(denoiser, halves(), (12, 3, RED))[0])


def test_the_matcher_tells_apart_what_has_the_same_color(new_denoiser):
    """Both halves have one color; only the lines, and with them the queries, differ."""
    denoiser, sketch = new_denoiser(), paper()
    sketch[..., ::2, SIZE // 2 :] = -1
    flat = color(SKIN).repeat(1, SIZE, SIZE)[None]
    _, change = spread(denoiser, flat, (3, 8, RED), sketch=sketch)
    _, without = spread(without_matcher(denoiser), flat, (3, 8, RED), sketch=sketch)
    assert change[:, 12:].mean() < 0.5 * change[:, :4].mean()
    assert without[:, 12:].mean() > 0.7 * without[:, :4].mean()


def test_hints_that_foretell_each_other_go_farther(new_denoiser):
    """A hint that makes the darker half redder, alone and with two others, which agree with it or not."""
    denoiser, picture = without_matcher(new_denoiser()), color((160, 130, 130)).repeat(1, SIZE, SIZE)[None]
    picture[..., SIZE // 2 :] = color((110, 80, 80))
    redder, there, places = (180, 80, 80), (110, 80, 80), ((9, 12), (14, 8))

    def far(*others):
        return spread(denoiser, picture, (12, 3, redder), *others)[1][:, :7].mean()

    alone = far()
    assert alone > 0.1
    assert far(*((x, y, redder) for x, y in places)) > 5 * alone
    assert far(*((x, y, there) for x, y in places)) < alone
