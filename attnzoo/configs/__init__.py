"""Data only: the catalogue of methods, autotune tables, recipes. No torch here."""

from attnzoo.configs.schema import Method, read_methods, read_toml

__all__ = ["Method", "read_methods", "read_toml"]
