"""The leader (rank 0) of a replica: its I/O thread and router links, the table of live streams, its state file."""
