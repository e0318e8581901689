"""liveavatar: a portrait, a text prompt and live speech become a talking avatar that streams."""

__version__ = "0.1.0"
