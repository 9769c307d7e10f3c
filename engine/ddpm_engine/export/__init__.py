"""Writers for what other libraries read."""
