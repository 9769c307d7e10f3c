"""Textbook implementations that the engine is measured against."""
