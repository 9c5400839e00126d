"""Batch norm with the statistics of the batch over all processes: two then equal one twice as large."""

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn


class SyncedBatchNorm2d(nn.BatchNorm2d):
    """`nn.BatchNorm2d` over the processes of a run; every process must hold as many pictures.

    torch's own SyncBatchNorm needs CUDA; this one runs with any backend, gloo too.
    """

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        if not self.training:
            return super().forward(x)
        values = x.float()
        mean = _ProcessMean.apply(values.mean((0, 2, 3)))
        # Two passes: the difference of two large squares would lose the variance.
        centred = values - mean[:, None, None]
        variance = _ProcessMean.apply(centred.square().mean((0, 2, 3)))
        self._remember(mean.detach(), variance.detach(), values.numel() // values.shape[1])
        normal = centred * torch.rsqrt(variance + self.eps)[:, None, None]
        return (normal * self.weight[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor, count: int) -> None:
        if self.running_mean is None or self.running_var is None or self.momentum is None:
            return
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        count *= dist.get_world_size()
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance * (count / max(count - 1, 1)), self.momentum)


class _ProcessMean(torch.autograd.Function):
    """The mean of a tensor over the processes, and of its gradient."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        return _mean(value)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _mean(gradient)


def _mean(value: Tensor) -> Tensor:
    total = value.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def synchronise(module: nn.Module) -> None:
    """Put a `SyncedBatchNorm2d` with the same tensors in the place of every batch norm of `module`."""
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            synced = SyncedBatchNorm2d(
                child.num_features, child.eps, child.momentum, child.affine, child.track_running_stats
            )
            synced.weight, synced.bias = child.weight, child.bias
            for buffer, value in child.named_buffers():
                synced.register_buffer(buffer, value)
            setattr(module, name, synced.train(child.training))
        else:
            synchronise(child)
