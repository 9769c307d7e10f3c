"""Distil a model to few steps: `accelerate launch launch/distill.py --teacher RUN --out DIR`."""

from ddpm_engine.cli.start import distill as main

if __name__ == "__main__":
    main()
