"""Settings of the whole test suite."""

import torch

# The tensors here are small: a second thread only waits for the first, longer where cores are busy.
torch.set_num_threads(1)
