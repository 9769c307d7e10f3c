"""Looking at what a model makes: pictures, and folders of them."""
