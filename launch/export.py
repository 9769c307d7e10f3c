"""Export a trained model for diffusers: `python launch/export.py --checkpoint RUN --out DIR`."""

from ddpm_engine.cli.start import export as main

if __name__ == "__main__":
    main()
