"""Train a diffusion model: `accelerate launch launch/train.py --preset NAME`."""

from ddpm_engine.cli.start import train as main

if __name__ == "__main__":
    main()
