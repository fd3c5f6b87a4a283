"""gkachat: small GPTs with softmax or Gaussian Kernel Attention."""
