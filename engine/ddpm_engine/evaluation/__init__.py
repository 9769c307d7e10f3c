"""Looking at what a model makes: pictures and, later, figures."""
