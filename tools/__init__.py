"""Commands behind the Makefile; not part of the package."""
