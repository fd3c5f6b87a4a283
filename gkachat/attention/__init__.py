"""Attention, complete in itself: features, the Gaussian kernel operator, and the layers a model is built from."""

from gkachat.attention.layers import ATTENTION, GaussianKernelAttention, SoftmaxAttention, register
from gkachat.attention.operator import gaussian_kernel_attention

__all__ = ["ATTENTION", "GaussianKernelAttention", "SoftmaxAttention", "gaussian_kernel_attention", "register"]
