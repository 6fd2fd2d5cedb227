"""Networks: ``forward(batch) -> logit_B``; they know no loss, optimizer, device or path."""
