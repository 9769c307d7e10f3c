"""Plot figures of a trained model: `python launch/visualize.py --checkpoint RUN --out DIR`."""

from ddpm_engine.cli.start import visualize as main

if __name__ == "__main__":
    main()
