"""The command line."""

from ddpm_engine.cache_directories import provide_for_no_home

# Before the commands import libraries that look for a home.
provide_for_no_home()
