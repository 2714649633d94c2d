"""Models of a Hugging Face hub by their ids: parsing an id, choosing the needed files, and downloading them into the hub's own cache."""
