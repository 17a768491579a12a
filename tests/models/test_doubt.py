import torch

from animediffusion.models.doubt import doubt_map


def test_doubt_is_the_difference_from_what_the_matcher_found(new_denoiser, new_batch):
    batch = new_batch()
    condition = new_denoiser().encode(batch.sketch, batch.reference)
    guess = condition.guess.detach().clamp(-1, 1)
    assert not doubt_map(condition, guess).any()
    found = doubt_map(condition._replace(guess=-torch.ones_like(guess)), torch.ones_like(guess))
    torch.testing.assert_close(found, torch.ones(4, 16, 16))
    image = guess.clone()
    image[..., 8:] += 0.2 * (image[..., 8:] < 0)
    doubt = doubt_map(condition, image)
    assert not doubt[..., :6].any()
    assert (doubt[..., 10:] > 0).any()


def test_a_network_without_a_matcher_has_no_doubt(new_denoiser, new_batch):
    batch = new_batch()
    condition = new_denoiser().encode(batch.sketch, batch.reference)
    assert doubt_map(condition._replace(guess=condition.guess[..., :0, :0]), batch.target) is None
