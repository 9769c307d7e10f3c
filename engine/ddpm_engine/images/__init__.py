"""Image files, grids of images, and what is diffused of them."""
