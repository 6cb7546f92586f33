"""Test vectors for RL and mixture-of-experts code."""
