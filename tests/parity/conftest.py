"""Lets torchvision be imported beside a PyTorch that it was not built for."""

import peers

peers.mend_torchvision()
