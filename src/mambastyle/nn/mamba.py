"""The block of Mamba (Gu and Dao, 2023, section 3.4) under the names of its published code."""

from typing import Literal

from mambastyle.nn.s6 import S6, S6Config


class Mamba(S6):
    """`S6` with the arguments of mamba-ssm's `Mamba`, whose state dict it loads as it is.

    Takes and gives (batch, length, d_model), for whole sequences: there is no cache for stepping token by
    token (`step`, `inference_params`).
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | Literal["auto"] = "auto",
        *,
        bias: bool = False,
        conv_bias: bool = True,
    ) -> None:
        rank = None if dt_rank == "auto" else dt_rank
        super().__init__(S6Config(d_model, d_state, expand, d_conv, rank, bias, conv_bias))
