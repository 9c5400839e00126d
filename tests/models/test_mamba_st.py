"""Mamba-ST keeps sizes, keeps pictures apart, shuffles reproducibly, and has the published size and cost."""

from dataclasses import replace

import pytest
import torch

from mambastyle.models import mamba_st
from mambastyle.models.mamba_st import MambaST, MambaSTConfig, fit_tokens

TINY = MambaSTConfig(
    dim=16, state=2, patch=4, encoder_layers=1, decoder_layers=2, decoder=((8,), (8, 6), (4, 3))
)


def tiny_model(**changes) -> MambaST:
    torch.manual_seed(0)
    return MambaST(replace(TINY, **changes))


def pictures(batch: int = 2, height: int = 20, width: int = 28, seed: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("content", [(1, 1), (3, 17), (20, 28), (8, 33)])
@pytest.mark.parametrize("style", [(1, 1), (5, 40), (24, 16)])
@torch.no_grad()
def test_any_sizes_give_the_size_of_the_content(content, style):
    stylized = tiny_model()(pictures(2, *content), pictures(2, *style, seed=2))
    assert stylized.shape == (2, 3, *content)
    assert stylized.isfinite().all()


@torch.no_grad()
def test_a_flat_picture_gives_no_nan():
    assert tiny_model()(torch.ones(2, 3, 12, 16), -torch.ones(2, 3, 8, 12)).isfinite().all()


@pytest.mark.parametrize("changes", [{}, {"shuffle": False}, {"position_grid": 3}])
@torch.no_grad()
def test_a_batch_equals_its_pictures_one_by_one(changes):
    model = tiny_model(**changes).eval()
    content, style = pictures(4), pictures(4, 16, 24, seed=2)
    together = model(content, style)
    apart = torch.cat([model(content[i : i + 1], style[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_cached_style_serves_every_picture():
    model = tiny_model().eval()
    content, style = pictures(), pictures(1, 16, 24, seed=2)
    torch.testing.assert_close(
        model.stylize(content, model.encode_style(style)), model(content, style.expand(2, -1, -1, -1))
    )


@torch.no_grad()
def test_the_shuffle_is_the_same_at_every_call_unless_a_generator_is_given():
    model = tiny_model()
    content, style = pictures(), pictures(seed=2)
    global_state = torch.get_rng_state()
    first, again = model(content, style), model(content, style)
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), global_state)
    other = model(content, style, generator=torch.Generator().manual_seed(7))
    assert not torch.allclose(first, other, atol=1e-4)
    assert torch.equal(other, model(content, style, generator=torch.Generator().manual_seed(7)))


@torch.no_grad()
def test_the_average_of_many_shuffles_depends_less_on_the_draw():
    model = tiny_model()
    content, style = pictures(), pictures(seed=2)

    def spread(average: int) -> float:
        draws = [
            model(content, style, average=average, generator=torch.Generator().manual_seed(seed))
            for seed in range(6)
        ]
        return torch.stack(draws).std(0).mean().item()

    assert spread(8) < 0.6 * spread(1)


@torch.no_grad()
def test_without_the_shuffle_there_is_nothing_to_draw():
    model = tiny_model(shuffle=False)
    content, style = pictures(), pictures(seed=2)
    other = model(content, style, average=3, generator=torch.Generator().manual_seed(7))
    assert torch.equal(model(content, style), other)


def test_style_tokens_are_repeated_or_left_out_but_never_mixed():
    tokens = torch.arange(2 * 3 * 4, dtype=torch.float32).view(2, 3, 4, 1)
    assert fit_tokens(tokens, 3, 4) is tokens
    assert fit_tokens(tokens, 6, 4)[0, :, 0, 0].tolist() == [0, 0, 4, 4, 8, 8]
    assert fit_tokens(tokens, 1, 2)[1].flatten().tolist() == [17, 19]


@pytest.mark.parametrize("changes", [{}, {"position_grid": 3}])
def test_every_parameter_gets_a_gradient(changes):
    model = tiny_model(**changes)
    output = model(pictures(), pictures(seed=2))
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(3))).mean().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().any()]
    assert dead == []


def test_the_scans_start_from_many_time_scales():
    scan = tiny_model().st_decoder[0].ss2d
    assert isinstance(scan, mamba_st.STSS2D)
    torch.testing.assert_close(scan.A_logs.exp(), torch.tensor([1.0, 2.0]).expand(128, 2))
    assert scan.dt_projs_bias.std() > 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 8}, "decoder has 3 stages, which enlarge by 4: patch 8 needs an enlargement of 8"),
        ({"decoder": ((8,), (8,), (4,))}, "end in 3 channels"),
        ({"decoder_layers": 0}, "must be 1 or more, got 1 and 0"),
        ({"position_grid": 0}, "position_grid must be 1 or more"),
    ],
)
def test_impossible_configs_say_why(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_wrong_arguments_say_what_to_do():
    model = tiny_model()
    with pytest.raises(ValueError, match="average must be 1 or more, got 0"):
        model(pictures(), pictures(), average=0)
    with pytest.raises(ValueError, match="expected 1 style or 2, one for each picture, got 3"):
        model(pictures(), pictures(3))
