"""Sample from a trained model: `python launch/sample.py --checkpoint RUN --out DIR`."""

from ddpm_engine.cli.start import sample as main

if __name__ == "__main__":
    main()
