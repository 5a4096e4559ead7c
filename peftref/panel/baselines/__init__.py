"""Published methods without a chapter, which the chapters compare with."""
