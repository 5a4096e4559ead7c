"""Weight arithmetic: finished weights adapt by adding, averaging and patching."""
