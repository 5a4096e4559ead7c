"""Test-time adaptation: a trained classifier meets unlabelled, shifted data."""
