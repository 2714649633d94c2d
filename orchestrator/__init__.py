"""Everything that is not a replica: router, controller, launchers, client and command line."""
