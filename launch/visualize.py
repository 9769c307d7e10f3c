"""Plot figures of a trained model: `python launch/visualize.py --checkpoint RUN --out DIR`."""

from ddpm_engine.cli.visualize import main

if __name__ == "__main__":
    main()
