"""Train an autoencoder: `accelerate launch launch/train_autoencoder.py --preset NAME`."""

from ddpm_engine.cli.start import train_autoencoder as main

if __name__ == "__main__":
    main()
