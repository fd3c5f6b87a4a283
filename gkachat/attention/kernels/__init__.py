"""Attention kernels, one file each, and the function that chooses among them."""
