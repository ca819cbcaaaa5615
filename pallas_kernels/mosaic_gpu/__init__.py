"""Fused dequantize-matmul in Mosaic GPU: Hopper (wgmma) and Ampere (mma), on one pre-shuffled weight layout."""
