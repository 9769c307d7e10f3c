"""The fused operations of the diffusion process; a leaf that depends on torch and Triton only.

| operation         | what it fuses                                                         |
|-------------------|-----------------------------------------------------------------------|
| `training_draws`  | timesteps, flips, dropped conditions, augmentation levels of a batch  |
| `q_sample`        | normalise, flip, generate noise, mix: image → x_t                     |
| `denoising_loss`  | same noise once more, target, weighted squared error, gradient        |
| `reverse_step`    | guidance, x0 estimate, clip, update, fresh noise: x_t → x_{t-1}       |
| `gaussian_noise`  | the same noise alone, such as that which samples start from            |
| `group_norm_silu` | GroupNorm of one map or two, a vector before, scale, shift, SiLU, dropout |
| `residual_sum`    | the sum that ends a residual branch, and moments for the norm after it |
| `modulate`        | gated residual, LayerNorm or RMSNorm, per-sample scale and shift       |
| `adamw_step`      | AdamW, moving averages, weights in half precision; `gradient_norm`    |

Each lives in the module or package of its name, in this order: the mathematics, the plain-torch
reference that specifies it, the Triton kernels, their launcher, the `torch.library` registration.
`philox` is the counter map behind all noise, `tiling` the indexing that the
elementwise ones share.
"""

from ddpm_kernels.adamw_step.op import adamw_step, gradient_norm
from ddpm_kernels.denoising_loss.op import denoising_loss
from ddpm_kernels.draws import training_draws
from ddpm_kernels.gaussian_noise import gaussian_noise
from ddpm_kernels.group_norm_silu.op import group_norm_silu, group_norm_silu_residual
from ddpm_kernels.modulate.op import modulate
from ddpm_kernels.moments import Moments
from ddpm_kernels.owed_bias import owe
from ddpm_kernels.philox import Stream, bernoulli, random_integers
from ddpm_kernels.q_sample import q_sample
from ddpm_kernels.residual_sum.op import residual_sum
from ddpm_kernels.reverse_step.columns import Column
from ddpm_kernels.reverse_step.op import reverse_step

__all__ = [
    "Column",
    "Moments",
    "Stream",
    "adamw_step",
    "bernoulli",
    "denoising_loss",
    "gaussian_noise",
    "gradient_norm",
    "group_norm_silu",
    "group_norm_silu_residual",
    "modulate",
    "owe",
    "q_sample",
    "random_integers",
    "residual_sum",
    "reverse_step",
    "training_draws",
]
