"""What the chapters of this part run: shared tasks, recorded runs, runs at scale."""
