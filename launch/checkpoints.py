"""List, verify, prune and average checkpoints: `python launch/checkpoints.py list RUN`."""

from ddpm_engine.cli.start import checkpoints as main

if __name__ == "__main__":
    main()
