"""The noise-predicting network: the DDPM U-Net and its class-conditional descendants."""

from ddpm_engine.unet.unet import UNet, check_shape

__all__ = ["UNet", "check_shape"]
