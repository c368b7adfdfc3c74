"""Native CPU kernels and their torch fallbacks."""
