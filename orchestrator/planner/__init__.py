"""``trireme plan``: whether a model fits, on which layouts, and how fast it will be. Pure; starts nothing and needs no GPU."""
