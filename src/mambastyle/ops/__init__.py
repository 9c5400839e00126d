"""Functions on tensors which every model is built from; they know no module and no model."""

from mambastyle.ops.mamba_ssm import selective_scan_fn
from mambastyle.ops.scan_paths import cross_paths, inverse_paths, zigzag_paths
from mambastyle.ops.selective_scan import available_backends, scan_backend, selective_scan, unavailable_reason
from mambastyle.ops.ss2d_scan import ss2d_scan

__all__ = [
    "available_backends",
    "cross_paths",
    "inverse_paths",
    "scan_backend",
    "selective_scan",
    "selective_scan_fn",
    "ss2d_scan",
    "unavailable_reason",
    "zigzag_paths",
]
