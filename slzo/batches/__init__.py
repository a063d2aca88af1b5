"""Token sequences, packed batches, and losses over their logits."""
