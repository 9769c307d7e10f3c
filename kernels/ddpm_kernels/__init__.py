"""The fused operations of the diffusion process; a leaf that depends on torch and Triton only.

| operation         | what it fuses                                                         |
|-------------------|-----------------------------------------------------------------------|
| `q_sample`        | normalise, flip, generate noise, mix: image → x_t                     |
| `denoising_loss`  | same noise once more, target, weighted squared error, gradient        |
| `reverse_step`    | guidance, x0 estimate, clip, update, fresh noise: x_t → x_{t-1}       |
| `gaussian_noise`  | the same noise alone, such as that which samples start from            |
| `group_norm_silu` | GroupNorm, affine, per-sample scale and shift, SiLU; and its gradient |

Each lives in the module or package of its name, in this order: the mathematics, the plain-torch
reference that specifies it, the Triton kernels, their launcher, the `torch.library` registration.
`philox` is the counter map behind all noise, `tiling` the indexing that the
elementwise ones share.
"""

from ddpm_kernels.denoising_loss import denoising_loss
from ddpm_kernels.gaussian_noise import gaussian_noise
from ddpm_kernels.group_norm_silu.op import group_norm_silu
from ddpm_kernels.philox import Stream, bernoulli, random_integers
from ddpm_kernels.q_sample import q_sample
from ddpm_kernels.reverse_step import Column, reverse_step

__all__ = [
    "Column",
    "Stream",
    "bernoulli",
    "denoising_loss",
    "gaussian_noise",
    "group_norm_silu",
    "q_sample",
    "random_integers",
    "reverse_step",
]
