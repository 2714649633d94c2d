"""The vocabulary of all processes: messages, errors, specs, and the Engine seam. Imports msgspec and nothing else."""
