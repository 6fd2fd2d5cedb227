"""Everything that touches TorchRec, torch.distributed and files of tensors."""
