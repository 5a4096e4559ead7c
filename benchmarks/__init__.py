"""Speed against a peer, measured: ``python -m benchmarks [slug ...]``."""
