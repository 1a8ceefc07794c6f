"""Encoders of photos and of recipes."""
