"""Reference implementations of methods by which trained models adapt; the package behind the peftref book."""

__version__ = "0.1.0"
__all__ = ["__version__"]
