"""From a request to samples in a folder, by any number of processes."""
