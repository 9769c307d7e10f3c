"""The U-Net of DDPM and its class-conditional descendants."""
