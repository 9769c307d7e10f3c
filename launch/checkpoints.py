"""List, verify, prune and average checkpoints: `python launch/checkpoints.py list RUN`."""

from ddpm_engine.cli.checkpoints import main

if __name__ == "__main__":
    main()
