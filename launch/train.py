"""Train a diffusion model: `accelerate launch launch/train.py --preset NAME`."""

from ddpm_engine.cli.train import main

if __name__ == "__main__":
    main()
