"""The part of a model that each rank holds, and its memory. Pure arithmetic, shared by loader, converter and planner."""
