"""Modules with weights of their own that serve training alone: opponents of a game, and what paints for them."""
