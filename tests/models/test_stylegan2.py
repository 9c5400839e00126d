"""StyleGAN2: shapes, latents, noise, feature input, discriminator."""

import copy
import io

import pytest
import torch

from mambastyle.models.stylegan2 import Discriminator, Generator, StyleGAN2Config, mix_styles

TINY = StyleGAN2Config(
    resolution=32, z_dim=16, w_dim=16, mapping_layers=2, widths=(16, 16, 8, 8), feature_layer=5
)


@pytest.fixture
def generator() -> Generator:
    torch.manual_seed(0)
    generator = Generator(TINY).eval()
    with torch.no_grad():
        for name, parameter in generator.named_parameters():
            if name.endswith("noise_strength"):
                parameter.fill_(0.3)
    return generator


@pytest.mark.parametrize("resolution", [32, 64, 256, 1024])
def test_latents_and_layers_follow_the_resolution(resolution):
    config = StyleGAN2Config(resolution=resolution, feature_layer=3)
    assert config.num_ws == {32: 8, 64: 10, 256: 14, 1024: 18}[resolution]
    assert config.layer_shape(1) == (512, 4)
    assert config.layer_shape(3) == (512, 8)
    assert config.layer_shape(config.num_ws - 1)[1] == resolution


def test_the_published_size_has_30_37_million_parameters():
    # specs: the 1024 px generator is 30.37 M (MambaStyle, table 1: generator included).
    with torch.device("meta"):
        count = sum(p.numel() for p in Generator(StyleGAN2Config()).parameters())
    assert round(count / 1e6, 2) == 30.37
    assert StyleGAN2Config().layer_shape(9) == (512, 64)


def test_a_batch_equals_its_pictures_one_by_one(generator):
    z = torch.randn(2, 16)
    with torch.no_grad():
        both = generator(z)
        apart = torch.cat([generator(z[:1]), generator(z[1:])])
    assert both.shape == (2, 3, 32, 32)
    torch.testing.assert_close(both, apart, rtol=1e-4, atol=1e-5)


def test_noise_modes(generator):
    ws = generator.mapping(torch.randn(2, 16))

    def draw(mode, seed=0):
        return generator.synthesis(ws, noise=mode, generator=torch.Generator().manual_seed(seed))

    with torch.no_grad():
        assert torch.equal(draw("const"), draw("const"))
        assert torch.equal(draw("random"), draw("random"))
        assert not torch.equal(draw("random"), draw("random", 1))
        assert not torch.equal(draw("none"), draw("const"))
    with pytest.raises(ValueError, match="noise"):
        draw("pink")


def test_truncation_pulls_towards_the_average(generator):
    generator.mapping.w_avg.fill_(0.5)
    z = torch.randn(2, 16)
    with torch.no_grad():
        ws = generator.mapping(z)
        torch.testing.assert_close(generator.mapping(z, truncation_psi=0.0), torch.full_like(ws, 0.5))
        cut = generator.mapping(z, truncation_psi=0.0, truncation_cutoff=3)
    torch.testing.assert_close(cut[:, :3], torch.full_like(ws[:, :3], 0.5))
    torch.testing.assert_close(cut[:, 3:], ws[:, 3:])


@pytest.mark.parametrize("layer", range(1, 8))
def test_a_feature_of_zeros_changes_nothing_and_others_act_behind_their_layer(layer):
    config = StyleGAN2Config(**{**TINY.__dict__, "feature_layer": layer})
    torch.manual_seed(0)
    generator = Generator(config).eval()
    ws = generator.mapping(torch.randn(2, 16))
    channels, size = config.layer_shape(layer)
    feature = torch.randn(2, channels, size, size)
    with torch.no_grad():
        plain = generator.synthesis(ws)
        torch.testing.assert_close(generator.synthesis(ws, torch.zeros_like(feature)), plain)
        changed = generator.synthesis(ws, feature)
        assert generator.synthesis.features_at(ws, layer).shape == feature.shape
    # to_rgb of the last resolution has run before the feature of its second convolution is added.
    assert torch.equal(changed, plain) == (layer == 7)


@pytest.mark.parametrize(("layer", "block", "conv"), [(1, 0, "conv1"), (4, 2, "conv0"), (5, 2, "conv1")])
def test_features_at_are_the_output_of_that_convolution(generator, layer, block, conv):
    ws = generator.mapping(torch.randn(2, 16))
    seen = []
    getattr(generator.synthesis.blocks[block], conv).register_forward_hook(lambda *call: seen.append(call[2]))
    with torch.no_grad():
        generator.synthesis(ws)
        assert torch.equal(generator.synthesis.features_at(ws, layer), seen[0])


def test_wrong_shapes_are_named(generator):
    ws = torch.zeros(2, TINY.num_ws, 16)
    with pytest.raises(ValueError, match=r"expected a feature of \(8, 16, 16\) at layer 5, got \(8, 8, 8\)"):
        generator.synthesis(ws, torch.zeros(2, 8, 8, 8))
    with pytest.raises(ValueError, match=r"expected ws of \(batch, 8, 16\)"):
        generator.synthesis(ws[:, :7])
    with pytest.raises(ValueError, match="expected z of width 16, got 8"):
        generator.mapping(torch.zeros(2, 8))
    with pytest.raises(ValueError, match="power of two"):
        StyleGAN2Config(resolution=48)
    with pytest.raises(ValueError, match="feature_layer from 1 to 7"):
        StyleGAN2Config(resolution=32, feature_layer=9)


def test_mixing_takes_the_first_rows_from_the_first():
    first, second = torch.zeros(2, 8, 4), torch.ones(2, 8, 4)
    mixed = mix_styles(first, second, torch.tensor([3, 8]))
    assert mixed.sum((1, 2)).tolist() == [20.0, 0.0]


def test_classes_change_the_picture_and_are_asked_for():
    torch.manual_seed(0)
    config = StyleGAN2Config(**{**TINY.__dict__, "c_dim": 3})
    generator, discriminator = Generator(config), Discriminator(config)
    z, c = torch.randn(2, 16), torch.eye(3)
    with torch.no_grad():
        first, second = generator(z, c[[0, 0]]), generator(z, c[[1, 1]])
        assert not torch.allclose(first, second)
        assert discriminator(first, c[[0, 1]]).shape == (2, 1)
    with pytest.raises(ValueError, match="class vector of width 3"):
        generator(z)
    with pytest.raises(ValueError, match="no class vector"):
        Generator(TINY)(z, c[[0, 0]])


def test_every_parameter_learns():
    torch.manual_seed(0)
    generator, discriminator = Generator(TINY), Discriminator(TINY)
    image = generator(torch.randn(4, 16), noise="random")
    discriminator(image).sum().backward()
    for network in (generator, discriminator):
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_the_discriminator_sees_the_groups_of_a_batch():
    torch.manual_seed(0)
    discriminator = Discriminator(TINY)
    same = torch.randn(1, 3, 32, 32).expand(4, -1, -1, -1)
    varied = torch.cat([same[:1], torch.randn(3, 3, 32, 32)])
    with torch.no_grad():
        assert not torch.allclose(discriminator(same)[0], discriminator(varied)[0])
        with pytest.raises(ValueError, match="32 x 32"):
            discriminator(torch.zeros(1, 3, 16, 16))


@torch.no_grad()
def changed_weights(generator: Generator) -> dict[str, torch.Tensor]:
    return {name: value * -1.5 for name, value in generator.synthesis.state_dict().items()}


def test_kept_kernels_serve_inference_and_graphs(generator):
    # In float64: a kept kernel lies in another order, which sums in another order.
    generator.double()
    z = torch.randn(2, 16, dtype=torch.float64)
    expected = generator(z).detach()
    generator.requires_grad_(False).synthesis.keep_kernels()
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(generator(z), expected, rtol=1e-9, atol=1e-12)
    # What inference mode kept serves a graph too.
    ws = generator.mapping(z).requires_grad_()
    generator.synthesis(ws).sum().backward()
    assert ws.grad.abs().sum() > 0


@pytest.mark.parametrize("change", ["in place", "loaded", "moved", "replaced", "called with", "trained"])
def test_kept_kernels_follow_weights_that_change(generator, change):
    fresh = copy.deepcopy(generator).requires_grad_(False)
    ws = generator.mapping(torch.randn(2, 16)).detach()
    synthesis = generator.requires_grad_(False).synthesis.keep_kernels()
    synthesis(ws)
    values = changed_weights(generator)
    fresh.synthesis.load_state_dict(values)
    if change == "in place":
        for name, value in synthesis.named_parameters():
            value.copy_(values[name])
        synthesis.load_state_dict(values)  # buffers
    elif change == "loaded":
        synthesis.load_state_dict(values, assign=True)
    elif change == "moved":
        synthesis.double()
        synthesis.load_state_dict(values)
        synthesis.float()
    elif change == "replaced":
        for block in synthesis.blocks:
            for layer in block.children():
                layer.weight = torch.nn.Parameter(layer.weight.clone(), requires_grad=False)
        synthesis.load_state_dict(values)
    elif change == "trained":
        generator.requires_grad_(True)
        synthesis.load_state_dict(values)
    if change == "called with":
        # Freed memory comes back at the same address: four others first.
        for factor in (2, 3, 4, 5):
            other = {name: factor * value for name, value in values.items()}
            torch.func.functional_call(synthesis, other, (ws,))
        found = torch.func.functional_call(synthesis, values, (ws,))
    else:
        found = synthesis(ws)
    torch.testing.assert_close(found.detach(), fresh.synthesis(ws), rtol=1e-4, atol=1e-4)


def test_only_who_asks_keeps_kernels_and_copies_do_not(generator):
    z = torch.randn(2, 16)
    generator.requires_grad_(False)
    generator(z)
    # As GAN codes average their weights: PyTorch does not count what is written through .data.
    average = copy.deepcopy(generator)
    average.synthesis.keep_kernels()
    average(z)
    average = copy.deepcopy(average)
    average(z)
    for mean, value in zip(average.parameters(), changed_weights(generator).values(), strict=False):
        mean.data.mul_(0.5).add_(value.mean(), alpha=0.5)
    expected = Generator(TINY).requires_grad_(False)
    expected.load_state_dict(average.state_dict())
    torch.testing.assert_close(average(z), expected(z), rtol=1e-5, atol=1e-5)
    sizes = []
    for keeps in (False, True):
        if keeps:
            generator.synthesis.keep_kernels()
            generator(z)
        torch.save(generator, buffer := io.BytesIO())
        sizes.append(buffer.tell())
    assert sizes[1] < sizes[0] + 2000
