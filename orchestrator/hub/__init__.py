"""Models of a Hugging Face hub by their ids: what an id means, which files of it are needed, and how they come into the hub's own cache."""
