"""The ground floor: tokens, packed batches, and losses over their logits; plain tensors only."""
