"""Pack images into shards: `python launch/make_shards.py SOURCE --out DIR`."""

from ddpm_engine.cli.start import make_shards as main

if __name__ == "__main__":
    main()
