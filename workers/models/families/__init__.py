"""Model families, a file each: what the keys of ``config.json`` mean, and how files name the family's tensors. Without torch."""
