"""SaMam keeps sizes, keeps pictures apart, caches a style, and starts as the paper means it."""

from dataclasses import replace

import pytest
import torch

from mambastyle.models.samam import SAVSSM, SaMam, SaMamConfig

TINY = SaMamConfig(
    dim=16,
    state=2,
    patch=4,
    encoder_layers=1,
    group_layers=2,
    squeeze=4,
    style_dim=6,
    embedder_steps=2,
    decoder=((8,), (8, 6), (4, 3)),
)
VARIANTS = [
    pytest.param({"published": published}, id=f"published-{published}") for published in (False, True)
]


def tiny_model(**changes) -> SaMam:
    torch.manual_seed(0)
    return SaMam(replace(TINY, **changes))


def led_by_the_style(model: SaMam) -> SaMam:
    """As after some training: no embedder is at zero any more."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.any():
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
    return model


def pictures(batch: int = 2, height: int = 20, width: int = 28, seed: int = 1) -> torch.Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("content", [(1, 1), (3, 17), (20, 28), (8, 33)])
@pytest.mark.parametrize("style", [(1, 1), (5, 40), (24, 16)])
@torch.no_grad()
def test_any_sizes_give_the_size_of_the_content(content, style):
    stylized = led_by_the_style(tiny_model())(pictures(2, *content), pictures(2, *style, seed=2))
    assert stylized.shape == (2, 3, *content)
    assert stylized.isfinite().all()


@torch.no_grad()
def test_a_flat_picture_gives_no_nan():
    model = led_by_the_style(tiny_model())
    assert model(torch.ones(2, 3, 12, 16), -torch.ones(2, 3, 8, 12)).isfinite().all()


@pytest.mark.parametrize("changes", VARIANTS)
@torch.no_grad()
def test_a_batch_equals_its_pictures_one_by_one(changes):
    model = led_by_the_style(tiny_model(**changes)).eval()
    content, style = pictures(4), pictures(4, 16, 24, seed=2)
    together = model(content, style)
    apart = torch.cat([model(content[i : i + 1], style[i : i + 1]) for i in range(4)])
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    assert (together - model(content, style.flip(0))).abs().max() > 1e-3


@torch.no_grad()
def test_a_cached_style_serves_every_picture():
    model = led_by_the_style(tiny_model()).eval()
    content, style = pictures(), pictures(1, 16, 24, seed=2)
    code = model.encode_style(style)
    assert code.shape == (1, 6, 3, 3)
    torch.testing.assert_close(model.stylize(content, code), model(content, style.expand(2, -1, -1, -1)))


@torch.no_grad()
def test_tokens_beyond_the_limit_are_cut_before_the_scan():
    torch.manual_seed(0)
    free, held = (SAVSSM(replace(TINY, token_limit=limit)) for limit in (None, 2.0))
    held.load_state_dict(free.state_dict())
    scanned = []
    for block in (free, held):
        block.s7.scan.register_forward_pre_hook(lambda _, inputs: scanned.append(inputs[0]))
    x, code = torch.randn(2, 16, 3, 5), torch.randn(2, 6, 3, 3)
    x[0, :, 1, 1] *= 100  # one token unlike the others
    for block in (free, held):
        block(x, code)
    assert scanned[0].max() > 2
    assert torch.equal(scanned[1], scanned[0].clamp(max=2))


@torch.no_grad()
def test_a_savssm_starts_as_the_identity():
    torch.manual_seed(0)
    x, code = torch.randn(2, 16, 3, 5), torch.randn(2, 6, 3, 3)
    torch.testing.assert_close(SAVSSM(TINY)(x, code), x)
    assert not torch.allclose(SAVSSM(replace(TINY, published=True))(x, code), x, atol=0.1)


def test_the_start_is_not_dead():
    """After one step every parameter of a SAVSSM gets a gradient, the embedders at once."""
    torch.manual_seed(0)
    block = SAVSSM(TINY)
    x, code, target = torch.randn(2, 16, 3, 5), torch.randn(2, 6, 3, 3), torch.randn(2, 16, 3, 5)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    for expected in ({"s7.sain.gamma.weight", "s7.sain.beta.bias", "scm.linear.weight"}, None, None):
        optimizer.zero_grad()
        (block(x, code) - target).square().mean().backward()
        alive = {name for name, p in block.named_parameters() if p.grad is not None and p.grad.abs().any()}
        assert expected is None or expected <= alive
        optimizer.step()
    assert alive == {name for name, _ in block.named_parameters()}


@pytest.mark.parametrize("changes", VARIANTS)
def test_every_parameter_gets_a_gradient(changes):
    model = led_by_the_style(tiny_model(**changes))
    output = model(pictures(), pictures(seed=2))
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(3))).mean().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().any()]
    assert dead == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": 8}, "decoder has 3 stages, which enlarge by 4: patch 8 needs an enlargement of 8"),
        ({"decoder": ((8,), (), (3,))}, "decoder must name the widths of each stage"),
        ({"groups": 0}, "groups must be 1 or more, got 0"),
        ({"token_limit": 0.0}, "token_limit must be above 0, or None for none, got 0.0"),
    ],
)
def test_impossible_configs_say_why(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


def test_wrong_arguments_say_what_to_do():
    with pytest.raises(ValueError, match="expected 1 style or 2, one for each picture, got 3"):
        tiny_model()(pictures(), pictures(3))
