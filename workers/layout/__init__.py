"""Which part of a model each rank holds, and how much memory that takes. Pure arithmetic; loader, converter and planner read the same."""
