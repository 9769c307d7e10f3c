"""Evaluate a model or a folder of images: `python launch/evaluate.py --checkpoint RUN`."""

from ddpm_engine.cli.start import evaluate as main

if __name__ == "__main__":
    main()
