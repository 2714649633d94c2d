"""A discrete-event simulator around the production objects: routing core, stream table, scheduler. Random fault schedules test them.

``python -m orchestrator.sim`` runs schedules; time, network and engine are simulated, all decisions are made by the production code.
"""
