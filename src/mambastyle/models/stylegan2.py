"""StyleGAN2, configuration F: mapping, synthesis and discriminator (Karras et al. 2020)."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mambastyle.checkpoints import Checkpoint, config_from_dict
from mambastyle.ops.modulated_conv import demodulation, kernel_energy, modulated_conv2d
from mambastyle.ops.resample import blur, downsample2, upsample2

Noise = Literal["const", "none", "random"]


@dataclass(frozen=True)
class StyleGAN2Config:
    """Sizes of one StyleGAN2. The defaults are the published 1024 px FFHQ network.

    `widths` gives the channels per resolution, 4 px first; empty means min(channel_base / size, channel_max).
    `feature_layer` is the k of MambaStyle: layers count from 1, the 4 px convolution, and 2r, 2r + 1 are the
    two convolutions of the r-th doubling, so that 9 is the second one at 64 px. 0 means no feature input.
    """

    resolution: int = 1024
    z_dim: int = 512
    w_dim: int = 512
    c_dim: int = 0
    mapping_layers: int = 8
    mapping_lr_multiplier: float = 0.01
    channel_base: int = 32768
    channel_max: int = 512
    widths: tuple[int, ...] = ()
    feature_layer: int = 9
    conv_clamp: float | None = None
    minibatch_std_group: int = 4

    def __post_init__(self) -> None:
        if self.resolution < 8 or self.resolution & (self.resolution - 1):
            raise ValueError(f"expected resolution to be a power of two from 8 up, got {self.resolution}")
        if self.widths and len(self.widths) != self.num_blocks:
            raise ValueError(
                f"expected {self.num_blocks} widths (4 to {self.resolution} px), got {len(self.widths)}"
            )
        if not 0 <= self.feature_layer < self.num_ws:
            raise ValueError(
                f"expected feature_layer from 1 to {self.num_ws - 1} (0 for none) at {self.resolution} px, "
                f"got {self.feature_layer}"
            )

    @property
    def num_blocks(self) -> int:
        """Resolutions from 4 px to the full one."""
        return int(math.log2(self.resolution)) - 1

    @property
    def num_ws(self) -> int:
        """Latents per picture: one per convolution and one for the last to_rgb."""
        return 2 * self.num_blocks

    @property
    def resolutions(self) -> tuple[int, ...]:
        return tuple(4 * 2**block for block in range(self.num_blocks))

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels per resolution, 4 px first."""
        if self.widths:
            return self.widths
        return tuple(min(self.channel_base // size, self.channel_max) for size in self.resolutions)

    def layer_shape(self, layer: int) -> tuple[int, int]:
        """(channels, side in pixels) of the activations of convolution `layer`, counted from 1."""
        if not 1 <= layer < self.num_ws:
            raise ValueError(f"expected a layer from 1 to {self.num_ws - 1}, got {layer}")
        return self.channels[layer // 2], self.resolutions[layer // 2]


class EqualLinear(nn.Module):
    """Fully connected layer with equalised learning rate (Karras et al. 2018, section 4.1)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        lr_multiplier: float = 1.0,
        bias_init: float = 0.0,
        activate: bool = False,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), bias_init))
        self.weight_gain = lr_multiplier / math.sqrt(in_features)
        self.bias_gain = lr_multiplier
        self.activate = activate

    def forward(self, x: Float[Tensor, "b i"]) -> Float[Tensor, "b o"]:
        # In float32 under autocast too: latents and styles are small, and everything behind hangs on them.
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            # The gains inside the product: no scaled copy of the weights.
            x = torch.addmm(
                self.bias,
                x.to(self.weight.dtype),
                self.weight.t(),
                beta=self.bias_gain,
                alpha=self.weight_gain,
            )
            return F.leaky_relu(x, 0.2) * math.sqrt(2) if self.activate else x


def normalize_2nd_moment(x: Float[Tensor, "b n"]) -> Float[Tensor, "b n"]:
    """Scale each row to unit mean square."""
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-8)


class MappingNetwork(nn.Module):
    """z (and class c) -> w, copied to every layer; keeps the running mean `w_avg` of w (batch, w_dim)."""

    w_avg: Tensor

    def __init__(self, config: StyleGAN2Config) -> None:
        super().__init__()
        self.config = config
        self.embed = EqualLinear(config.c_dim, config.w_dim) if config.c_dim else None
        width = config.z_dim + (config.w_dim if config.c_dim else 0)
        self.fc = nn.ModuleList()
        for _ in range(config.mapping_layers):
            layer = EqualLinear(
                width, config.w_dim, lr_multiplier=config.mapping_lr_multiplier, activate=True
            )
            self.fc.append(layer)
            width = config.w_dim
        self.register_buffer("w_avg", torch.zeros(config.w_dim))

    def forward(
        self,
        z: Float[Tensor, "b z_dim"],
        c: Float[Tensor, "b c_dim"] | None = None,
        truncation_psi: float = 1.0,
        truncation_cutoff: int | None = None,
    ) -> Float[Tensor, "b num_ws w_dim"]:
        """Truncation pulls the first `truncation_cutoff` layers (default all) towards `w_avg`."""
        ws = self.w(z, c)[:, None].expand(-1, self.config.num_ws, -1)
        if truncation_psi == 1.0:
            return ws
        truncated = self.w_avg.lerp(ws, truncation_psi)
        if truncation_cutoff is None:
            return truncated
        return torch.cat([truncated[:, :truncation_cutoff], ws[:, truncation_cutoff:]], 1)

    def w(
        self, z: Float[Tensor, "b z_dim"], c: Float[Tensor, "b c_dim"] | None = None
    ) -> Float[Tensor, "b w_dim"]:
        """One w per picture, not truncated."""
        if z.shape[1] != self.config.z_dim:
            raise ValueError(f"expected z of width {self.config.z_dim}, got {z.shape[1]}")
        if (c is None) != (self.embed is None):
            wanted = f"a class vector of width {self.config.c_dim}" if self.embed else "no class vector"
            raise ValueError(f"this mapping network expects {wanted}")
        x = normalize_2nd_moment(z)
        if self.embed is not None and c is not None:
            x = torch.cat([x, normalize_2nd_moment(self.embed(c))], 1)
        for layer in self.fc:
            x = layer(x)
        return x

    @torch.no_grad()
    def update_w_avg(self, w: Float[Tensor, "b w_dim"], decay: float = 0.998) -> None:
        """Move the running mean towards the mean of this batch."""
        self.w_avg.copy_(w.mean(0).lerp(self.w_avg, decay))


class SynthesisLayer(nn.Module):
    """Modulated 3 x 3 convolution, noise, bias, leaky ReLU (figure 2d of StyleGAN2)."""

    noise_const: Tensor

    def __init__(
        self, in_channels: int, out_channels: int, size: int, config: StyleGAN2Config, up: int = 1
    ) -> None:
        super().__init__()
        self.up, self.size, self.clamp = up, size, config.conv_clamp
        self.affine = EqualLinear(config.w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.noise_strength = nn.Parameter(torch.zeros(()))
        self.register_buffer("noise_const", torch.randn(size, size))
        self.weight_gain = 1 / math.sqrt(in_channels * 9)
        self.keeps_kernel = False
        self._kept: tuple[tuple[Any, ...], Tensor, Tensor] | None = None

    def forward(
        self,
        x: Float[Tensor, "b i h w"],
        w: Float[Tensor, "b w_dim"],
        noise: Noise,
        generator: torch.Generator | None,
    ) -> Float[Tensor, "b o h2 w2"]:
        style = self.affine(w)
        weight, energy = self._weight_and_energy()
        x = modulated_conv2d(x, weight, style, demodulate=False, up=self.up)
        # The leaky ReLU is homogeneous: its gain of sqrt(2) goes into the factors before it, one pass less.
        gain = math.sqrt(2)
        scale = (demodulation(energy, style) * gain).to(x.dtype)[:, :, None, None]
        # In place where nothing needs what was there: fresh memory costs more than the arithmetic.
        keep = torch.is_grad_enabled() or torch.compiler.is_compiling()
        bias = (self.bias * gain).to(x.dtype)[:, None, None]
        x = torch.addcmul(bias, x, scale, out=None if keep else x)
        added = self.noise(x, noise, generator)
        if added is not None:
            x = x.add_((added * self.noise_strength * gain).to(x.dtype))
        x = F.leaky_relu(x, 0.2, inplace=True)
        return x if self.clamp is None else x.clamp(-self.clamp * gain, self.clamp * gain)

    def _weight_and_energy(self) -> tuple[Tensor, Tensor]:
        """The scaled kernel and its energy per pair of channels; kept where `keep_kernels` allows it."""
        # A tensor made in inference mode counts no versions: whether it changed cannot be told. torch.compile
        # cannot follow that question, so it comes last.
        if (
            not self.keeps_kernel
            or torch.compiler.is_compiling()
            or self.weight.requires_grad
            or not isinstance(self.weight, nn.Parameter)  # put there for one call, by functional_call
            or self.weight.is_inference()
        ):
            weight = self.weight * self.weight_gain
            return weight, kernel_energy(weight)
        key = (id(self.weight), self.weight.data_ptr(), self.weight._version, self.weight.dtype)
        if self._kept is None or self._kept[0] != key:
            # Ordinary tensors even if inference mode asks first: a graph may need them later.
            with torch.inference_mode(False), torch.no_grad():
                weight = self.weight * self.weight_gain
                energy = kernel_energy(weight)
                if self.up == 2:
                    turned = weight.transpose(0, 1).contiguous(memory_format=torch.channels_last)
                    weight = turned.transpose(0, 1)
                self._kept = (key, weight, energy)
        return self._kept[1:]

    def __getstate__(self) -> dict[str, Any]:
        # A copy may be trained, averaged into, or sent elsewhere: it keeps nothing until it is told to.
        return self.__dict__ | {"keeps_kernel": False, "_kept": None}

    def noise(self, x: Tensor, mode: Noise, generator: torch.Generator | None) -> Tensor | None:
        """The noise picture of this layer, one channel; None when there is none."""
        if mode == "none":
            return None
        if mode == "const":
            return self.noise_const
        if mode == "random":
            return torch.randn((x.shape[0], 1, *x.shape[2:]), generator=generator, device=x.device)
        raise ValueError(f'expected noise "const", "none" or "random", got {mode!r}')


class ToRGB(nn.Module):
    """Modulated 1 x 1 convolution to the picture, not demodulated (figure 7b of StyleGAN2)."""

    def __init__(self, in_channels: int, config: StyleGAN2Config) -> None:
        super().__init__()
        self.affine = EqualLinear(config.w_dim, in_channels, bias_init=1.0)
        self.weight = nn.Parameter(torch.randn(3, in_channels, 1, 1))
        self.bias = nn.Parameter(torch.zeros(3))
        self.clamp = config.conv_clamp
        self.weight_gain = 1 / math.sqrt(in_channels)

    def forward(self, x: Float[Tensor, "b i h w"], w: Float[Tensor, "b w_dim"]) -> Float[Tensor, "b 3 h w"]:
        style = self.affine(w) * self.weight_gain
        x = modulated_conv2d(x, self.weight, style, demodulate=False).float()
        x = x + self.bias[:, None, None]
        return x if self.clamp is None else x.clamp(-self.clamp, self.clamp)


class SynthesisBlock(nn.Module):
    """One resolution: two convolutions (one at 4 px, on the learned constant) and a skip to the picture."""

    def __init__(self, in_channels: int, out_channels: int, size: int, config: StyleGAN2Config) -> None:
        super().__init__()
        if in_channels:
            self.const = None
            self.conv0 = SynthesisLayer(in_channels, out_channels, size, config, up=2)
        else:
            self.const = nn.Parameter(torch.randn(out_channels, 4, 4))
            self.conv0 = None
        self.conv1 = SynthesisLayer(out_channels, out_channels, size, config)
        self.torgb = ToRGB(out_channels, config)


class SynthesisNetwork(nn.Module):
    """ws (batch, num_ws, w_dim) -> picture (batch, 3, resolution, resolution), about [-1, 1], not clamped."""

    def __init__(self, config: StyleGAN2Config) -> None:
        super().__init__()
        self.config = config
        in_channels = (0, *config.channels[:-1])
        self.blocks = nn.ModuleList(
            SynthesisBlock(*sizes, config)
            for sizes in zip(in_channels, config.channels, config.resolutions, strict=True)
        )

    def forward(
        self,
        ws: Float[Tensor, "b num_ws w_dim"],
        feature: Float[Tensor, "b c h w"] | None = None,
        noise: Noise = "const",
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "b 3 r r"]:
        """Render. `feature` is added to the activations of convolution `config.feature_layer`.

        It is added behind that convolution's leaky ReLU; where it is the second of its resolution, to_rgb of
        that resolution has run by then and does not see it (as in the repositories that share this layout).
        """
        if feature is not None:
            if not self.config.feature_layer:
                raise ValueError("this generator takes no feature: its feature_layer is 0")
            channels, size = self.config.layer_shape(self.config.feature_layer)
            if tuple(feature.shape[1:]) != (channels, size, size):
                raise ValueError(
                    f"expected a feature of ({channels}, {size}, {size}) at layer "
                    f"{self.config.feature_layer}, got {tuple(feature.shape[1:])}"
                )
        image, _ = self._run(ws, feature, noise, generator, stop=self.config.num_ws)
        if image is None:
            raise AssertionError("the last block always renders")
        return image

    def keep_kernels(self) -> "SynthesisNetwork":
        """Keep what rendering derives from the weights (scaled and turned kernels), for a frozen network.

        That is a fifth of a training step of the inversion at 64 px, and a seventh of rendering a picture.
        Weights that are trained, replaced, moved, loaded or changed in place are noticed. What is written
        through `.data`, which PyTorch does not count, is not: it asks for a network that keeps nothing, as a
        new one or a copy does.
        """
        for block in cast("Iterable[SynthesisBlock]", self.blocks):
            for layer in (block.conv0, block.conv1):
                if layer is not None:
                    layer.keeps_kernel = True
        return self

    def features_at(
        self,
        ws: Float[Tensor, "b num_ws w_dim"],
        layer: int,
        noise: Noise = "const",
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """The activations of convolution `layer` (counted from 1); nothing behind it is computed."""
        self.config.layer_shape(layer)
        return self._run(ws, None, noise, generator, stop=layer)[1]

    def _run(
        self,
        ws: Tensor,
        feature: Tensor | None,
        noise: Noise,
        generator: torch.Generator | None,
        stop: int,
    ) -> tuple[Tensor | None, Tensor]:
        if tuple(ws.shape[1:]) != (self.config.num_ws, self.config.w_dim):
            raise ValueError(
                f"expected ws of (batch, {self.config.num_ws}, {self.config.w_dim}), got {tuple(ws.shape)}"
            )
        rows = ws.unbind(1)
        image, x, layer = None, rows[0], 0
        for block in cast("Iterable[SynthesisBlock]", self.blocks):
            if block.const is not None:
                x = block.const.expand(ws.shape[0], -1, -1, -1)
            if block.conv0 is not None:
                layer += 1
                x = block.conv0(x, rows[layer - 1], noise, generator)
                if feature is not None and layer == self.config.feature_layer:
                    x = x + feature.to(x.dtype)
                if layer == stop:
                    return None, x
            layer += 1
            x = block.conv1(x, rows[layer - 1], noise, generator)
            if layer == stop:
                return None, x
            # to_rgb shares its w with the first convolution of the next resolution.
            rgb = block.torgb(x, rows[layer])
            image = rgb if image is None else upsample2(image) + rgb
            if feature is not None and layer == self.config.feature_layer:
                x = x + feature.to(x.dtype)
        return image, x


class Generator(nn.Module):
    """Mapping and synthesis, called apart or together."""

    def __init__(self, config: StyleGAN2Config) -> None:
        super().__init__()
        self.config = config
        self.mapping = MappingNetwork(config)
        self.synthesis = SynthesisNetwork(config)

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, feature_layer: int | None = None) -> "Generator":
        """The frozen generator of a checkpoint of kind "stylegan2", in float32.

        feature_layer: where a feature enters, if not where the checkpoint says; no tensor depends on it.
        """
        config = config_from_dict(StyleGAN2Config, checkpoint.config)
        if feature_layer is not None:
            config = dataclasses.replace(config, feature_layer=feature_layer)
        with torch.random.fork_rng(devices=[]):
            generator = cls(config)
        tensors = checkpoint.part("generator.")
        generator.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        return generator.requires_grad_(False).eval()

    def forward(
        self,
        z: Float[Tensor, "b z_dim"],
        c: Float[Tensor, "b c_dim"] | None = None,
        truncation_psi: float = 1.0,
        noise: Noise = "const",
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "b 3 r r"]:
        ws = self.mapping(z, c, truncation_psi)
        return self.synthesis(ws, noise=noise, generator=generator)


def mix_styles(
    ws: Float[Tensor, "b num_ws w_dim"], other: Float[Tensor, "b num_ws w_dim"], cutoff: Tensor
) -> Float[Tensor, "b num_ws w_dim"]:
    """Style mixing (StyleGAN, section 3.1): rows before `cutoff` (batch,) from `ws`, others from `other`."""
    rows = torch.arange(ws.shape[1], device=ws.device)
    return torch.where((rows[None] < cutoff[:, None])[..., None], ws, other)


class EqualConv(nn.Module):
    """Convolution with equalised learning rate, optional 2x downsampling, bias and leaky ReLU."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        down: bool = False,
        bias: bool = True,
        activate: bool = True,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.weight_gain = 1 / math.sqrt(in_channels * kernel_size**2)
        self.down, self.activate = down, activate
        self.gain = gain * (math.sqrt(2) if activate else 1.0)

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h2 w2"]:
        weight = self.weight * (self.weight_gain * self.gain)
        bias = None if self.bias is None else self.bias * self.gain
        size = weight.shape[-1]
        if not self.down:
            x = F.conv2d(x, weight, bias, padding=size // 2)
        elif size == 1:
            x = F.conv2d(downsample2(x), weight, bias)
        else:
            x = F.conv2d(blur(x, padding=2), weight, bias, stride=2)
        return F.leaky_relu(x, 0.2) if self.activate else x


class DiscriminatorBlock(nn.Module):
    """Residual block of the discriminator (figure 7c): half the size."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        # The sum of the two branches keeps its variance by a factor sqrt(0.5) on each.
        self.conv0 = EqualConv(in_channels, in_channels, 3)
        self.conv1 = EqualConv(in_channels, out_channels, 3, down=True, gain=math.sqrt(0.5))
        self.skip = EqualConv(
            in_channels, out_channels, 1, down=True, bias=False, activate=False, gain=math.sqrt(0.5)
        )

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o h//2 w//2"]:
        return self.conv1(self.conv0(x)) + self.skip(x)


def minibatch_std(x: Float[Tensor, "b c h w"], group: int) -> Float[Tensor, "b c+1 h w"]:
    """Append the standard deviation over groups of pictures as one more channel (ProGAN, section 3)."""
    batch, channels, height, width = x.shape
    while batch % group:
        group -= 1
    y = x.float().reshape(group, -1, channels, height, width)
    y = (y.var(0, unbiased=False) + 1e-8).sqrt().mean((1, 2, 3))  # (batch // group,)
    y = y.repeat(group)[:, None, None, None].expand(-1, 1, height, width)
    return torch.cat([x, y.to(x.dtype)], 1)


class Discriminator(nn.Module):
    """Residual discriminator; with classes, the projection of Miyato & Koyama (2018) as in stylegan2-ada."""

    def __init__(self, config: StyleGAN2Config) -> None:
        super().__init__()
        self.config = config
        channels = config.channels[::-1]
        self.from_rgb = EqualConv(3, channels[0], 1)
        self.blocks = nn.ModuleList(DiscriminatorBlock(fine, coarse) for fine, coarse in pairwise(channels))
        self.conv = EqualConv(channels[-1] + 1, channels[-1], 3)
        self.fc = EqualLinear(channels[-1] * 16, channels[-1], activate=True)
        self.out = EqualLinear(channels[-1], config.w_dim if config.c_dim else 1)
        self.embed = EqualLinear(config.c_dim, config.w_dim) if config.c_dim else None

    def forward(
        self, image: Float[Tensor, "b 3 r r"], c: Float[Tensor, "b c_dim"] | None = None
    ) -> Float[Tensor, "b 1"]:
        if image.shape[-1] != self.config.resolution or image.shape[-2] != self.config.resolution:
            size = self.config.resolution
            raise ValueError(
                f"expected pictures of {size} x {size}, got {image.shape[-2]} x {image.shape[-1]}"
            )
        x = self.from_rgb(image)
        for block in self.blocks:
            x = block(x)
        x = self.conv(minibatch_std(x, self.config.minibatch_std_group))
        logits = self.out(self.fc(x.flatten(1))).float()
        if self.embed is None:
            return logits
        if c is None:
            raise ValueError(f"this discriminator expects a class vector of width {self.config.c_dim}")
        cmap = normalize_2nd_moment(self.embed(c))
        return (logits * cmap).sum(1, keepdim=True) / math.sqrt(self.config.w_dim)
