"""Builders that several test files share: models, pictures, traces, bundles, Algorithm 2."""
