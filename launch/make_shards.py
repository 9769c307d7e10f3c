"""Pack images into shards: `python launch/make_shards.py SOURCE --out DIR`."""

from ddpm_engine.cli.make_shards import main

if __name__ == "__main__":
    main()
